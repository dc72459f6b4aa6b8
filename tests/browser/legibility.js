// Looks at a page as a reader would, and returns what is wrong with it, one sentence each.
// Argument: {smallest: size of text in CSS pixels, contrast: ratio that WCAG 2 asks of text, large: of large text}.
({ smallest, contrast, large }) => {
  const problems = [];
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width)
    problems.push(`the page is ${document.documentElement.scrollWidth} px wide in a window of ${width} px`);

  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  canvas.canvas.width = canvas.canvas.height = 1;
  const colours = new Map();
  const parse = (colour) => {
    if (!colours.has(colour)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
      colours.set(colour, [r, g, b, a / 255]);
    }
    return colours.get(colour);
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((part, index) => part * a + below[index] * (1 - a));
  const luminance = (colour) => {
    const [r, g, b] = colour.map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (first, second) => {
    const [low, high] = [luminance(first), luminance(second)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };

  // What lies behind a point: the backgrounds of the element and what it is in, then shapes drawn before the text.
  const behind = (element, x, y) => {
    const chain = [];
    for (let node = element; node instanceof Element; node = node.parentElement) chain.unshift(node);
    let colour = [255, 255, 255];
    for (const node of chain)
      if (!(node instanceof SVGElement) || node instanceof SVGSVGElement)
        colour = over(parse(getComputedStyle(node).backgroundColor), colour);
    const svg = element.closest("svg");
    if (svg)
      for (const shape of svg.querySelectorAll("rect, circle")) {
        if (!(shape.compareDocumentPosition(element) & Node.DOCUMENT_POSITION_FOLLOWING)) continue;
        const box = shape.getBoundingClientRect();
        if (x < box.left || x > box.right || y < box.top || y > box.bottom) continue;
        const style = getComputedStyle(shape);
        const [r, g, b, a] = parse(style.fill);
        colour = over([r, g, b, a * style.fillOpacity * style.opacity], colour);
      }
    return colour;
  };

  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("title, desc, style, script")) continue;
    const style = getComputedStyle(element);
    if (style.visibility === "hidden") continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const boxes = [...range.getClientRects()].filter((box) => box.width > 0 && box.height > 0);
    if (!boxes.length) continue;
    const svg = element.closest("svg");
    const scale = svg ? element.getScreenCTM().a : 1;
    const size = parseFloat(style.fontSize) * scale;
    const said = `"${node.data.trim().slice(0, 40)}"`;
    if (size < smallest) problems.push(`${said} is ${size.toFixed(1)} px`);
    if (svg) {
      const frame = svg.getBoundingClientRect();
      for (const box of boxes)
        if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 2 || box.bottom > frame.bottom + 2)
          problems.push(`${said} leaves the drawing "${svg.getAttribute("aria-label")}"`);
    }
    const box = boxes[0];
    const ground = behind(element, (box.left + box.right) / 2, (box.top + box.bottom) / 2);
    const ink = over(parse(svg ? style.fill : style.color), ground);
    const found = ratio(ink, ground);
    const isLarge = size >= 24 || (size >= 18.66 && parseInt(style.fontWeight) >= 700);
    if (found < (isLarge ? large : contrast)) problems.push(`${said} has a contrast of ${found.toFixed(2)}`);
    // A line's box is higher than its letters; what a region scrolls away is not seen.
    const region = element.closest(".scroll, pre")?.getBoundingClientRect();
    for (const one of boxes) {
      const trim = one.height * 0.22;
      const right = region ? Math.min(one.right, region.right) : one.right;
      if (right - one.left > 1)
        texts.push({ said, left: one.left + 0.5, right: right - 0.5, top: one.top + trim, bottom: one.bottom - trim });
    }
  }

  texts.sort((a, b) => a.top - b.top);
  for (let index = 0; index < texts.length; index++)
    for (let other = index + 1; other < texts.length && texts[other].top < texts[index].bottom; other++)
      if (texts[index].left < texts[other].right && texts[other].left < texts[index].right)
        problems.push(`${texts[index].said} and ${texts[other].said} overlap`);

  for (const element of document.querySelectorAll("main *")) {
    if (element.closest(".scroll, svg, pre") && !element.matches(".scroll, svg, pre")) continue;
    const box = element.getBoundingClientRect();
    if (box.width && (box.right > width + 1 || box.left < -1))
      problems.push(`<${element.localName}> reaches from ${box.left.toFixed(0)} to ${box.right.toFixed(0)} px`);
  }
  return problems;
};
