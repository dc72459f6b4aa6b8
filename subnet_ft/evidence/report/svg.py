"""A few lines of SVG: elements with escaped attributes and text, coloured by CSS classes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

_MOST_READ_OUT = 30


class Svg:
    """One drawing; `render` gives its markup. Every string that enters is escaped.

    Args:
        width: Width of the view box; text sizes are in its units.
        height: Height of the view box.
        title: What the drawing shows, for people who hear it instead.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self._height, self._title = width, height, title
        self._parts: list[str] = []
        self._tips: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self._add("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": style})

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        style: str,
        *,
        tip: str = "",
        opacity: float | None = None,
    ) -> None:
        attributes: dict[str, str | float] = {
            "x": x,
            "y": y,
            "width": max(width, 0.0),
            "height": height,
            "class": style,
        }
        if opacity is not None:
            attributes["fill-opacity"] = opacity
        self._add("rect", attributes, tip=tip)

    def circle(self, x: float, y: float, radius: float, style: str, *, tip: str = "") -> None:
        self._add("circle", {"cx": x, "cy": y, "r": radius, "class": style}, tip=tip)

    def path(self, coordinates: list[tuple[float, float]], style: str) -> None:
        steps = " ".join(f"{'L' if index else 'M'}{x:.1f} {y:.1f}" for index, (x, y) in enumerate(coordinates))
        self._add("path", {"d": steps, "class": style})

    def cells(self, boxes: list[tuple[float, float, float, float]], style: str, *, opacity: float) -> None:
        """Draw boxes (x, y, width, height) of one shade as one element."""
        if boxes:
            steps = "".join(f"M{x:.1f} {y:.1f}h{w:.1f}v{h:.1f}h{-w:.1f}z" for x, y, w, h in boxes)
            self._add("path", {"d": steps, "class": style, "fill-opacity": opacity})

    def text(self, x: float, y: float, content: str, style: str = "tick", *, anchor: str = "start") -> None:
        attributes: dict[str, str | float] = {"x": x, "y": y, "class": style, "text-anchor": anchor}
        self._parts.append(f"<text{_attributes(attributes)}>{escape(content)}</text>")

    def note(self, content: str) -> None:
        """Add to what is read out where marks have no tips of their own."""
        self._tips.append(content)

    def render(self, style: str = "") -> str:
        head = {"viewBox": f"0 0 {self.width:g} {self._height:g}", "class": style, "role": "img"}
        body = "".join(self._parts)
        label = escape(self._title)
        # What a pointer shows mark by mark is read out in one go; many marks are left to the table beside the drawing.
        count = len(self._tips)
        said = "; ".join(self._tips) if count <= _MOST_READ_OUT else f"{count} values, which the table holds"
        about = f"<title>{label}</title>" + (f"<desc>{escape(said)}</desc>" if said else "")
        return f'<svg{_attributes(head)} aria-label="{label}">{about}{body}</svg>'

    def _add(self, tag: str, attributes: Mapping[str, str | float], *, tip: str = "") -> None:
        if tip:
            self._tips.append(tip)
        inner = f"><title>{escape(tip)}</title></{tag}>" if tip else "/>"
        self._parts.append(f"<{tag}{_attributes(attributes)}{inner}")


def _attributes(attributes: Mapping[str, str | float]) -> str:
    def value(entry: str | float) -> str:
        return escape(entry) if isinstance(entry, str) else f"{round(entry, 2):g}"

    return "".join(f' {name}="{value(entry)}"' for name, entry in attributes.items())


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers that cover [low, high], ends included."""
    if not high > low:
        low, high = low - 0.5, low + 0.5
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]
