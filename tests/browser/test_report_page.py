"""A report with every section filled, as a reader sees it: on a phone, on a desk, in the dark and on paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser_pages import Scheme, opened, problems, unfold
from playwright.sync_api import Browser
from report_evidence import FIGURES, extreme_report, full_report

from subnet_ft.evidence.report import write_report

pytestmark = pytest.mark.browser

PAPER = 718
"""Width of A4 between margins of 1 cm, in CSS pixels."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(full_report(), tmp_path_factory.mktemp("report"))["html"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_report_is_legible(chromium: Browser, report: Path, screenshots: Path, width: int, scheme: Scheme) -> None:
    with opened(chromium, report, width, scheme) as page:
        page.screenshot(path=screenshots / f"report-{width}-{scheme}.png", full_page=True)
        unfold(page)
        assert problems(page) == []


@pytest.mark.parametrize("width", [390, 600, 1440])
def test_report_of_long_numbers_and_names_is_legible(chromium: Browser, tmp_path: Path, width: int) -> None:
    path = write_report(extreme_report(), tmp_path)["html"]
    with opened(chromium, path, width) as page:
        unfold(page)
        assert problems(page) == []


@pytest.mark.parametrize("width", [390, 1440])
def test_report_draws_every_figure(chromium: Browser, report: Path, width: int) -> None:
    with opened(chromium, report, width) as page:
        assert page.eval_on_selector_all("figure", "found => found.map((figure) => figure.id)") == FIGURES
        for name in FIGURES:
            figure = page.locator(f"figure#{name}")
            assert figure.locator("h3").inner_text().endswith("?")
            assert figure.locator(".answer").inner_text().strip()
            drawings = figure.locator("svg:visible")
            assert drawings.count() == (3 if name == "scatter-changes" else 1)
            for drawing in drawings.all():
                box = drawing.bounding_box()
                assert box is not None
                assert box["width"] > 200
                assert box["height"] > 50
                assert drawing.locator("rect, circle, path").count() >= 2
                assert drawing.locator("> title").text_content()
                assert drawing.locator("> desc").count() == 1


def test_report_fetches_nothing(chromium: Browser, report: Path) -> None:
    context = chromium.new_context()
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(report.as_uri(), wait_until="networkidle")
    context.close()
    assert asked == [report.as_uri()]
    assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_prints_whole(chromium: Browser, report: Path, screenshots: Path, scheme: Scheme) -> None:
    with opened(chromium, report, PAPER, scheme) as page:
        page.emulate_media(media="print", color_scheme=scheme)
        assert problems(page) == []
        cut = page.evaluate(
            """() => [...document.querySelectorAll("main *")].filter((element) => {
                const style = getComputedStyle(element);
                const clips = style.overflowX !== "visible" || style.overflowY !== "visible";
                const beyond = element.scrollWidth - element.clientWidth;
                const below = element.scrollHeight - element.clientHeight;
                return clips && Math.max(beyond, below) > 1 && !element.closest("svg") && element.clientWidth > 0;
            }).map((element) => element.className || element.localName)"""
        )
        assert cut == []
        tables: list[Any] = page.eval_on_selector_all(
            "table", "found => found.map((table) => table.getBoundingClientRect().height)"
        )
        assert min(tables) > 20, "a folded table is not on paper"
        assert page.eval_on_selector_all(
            "figure svg", "found => found.every((svg) => getComputedStyle(svg).breakInside === 'avoid')"
        )
        pdf = page.pdf(
            path=screenshots / f"report-{scheme}.pdf",
            format="A4",
            margin=dict.fromkeys(("top", "bottom", "left", "right"), "1cm"),
        )
        assert pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") >= 5


@pytest.mark.parametrize(
    ("style", "said"),
    [
        ("svg text.tick { font-size: 9px !important }", "is 9"),
        ("svg text { letter-spacing: 1em }", "overlap"),
        ("svg text { transform: translateX(-60px) }", "leaves the drawing"),
        (":root { --soft: #b5b5b5 !important }", "has a contrast of"),
        ("svg rect.cell { fill: #1f2124 !important; fill-opacity: 1 !important }", "has a contrast of"),
        ("table { min-width: 60rem } .scroll { overflow: visible !important }", "px wide in a window"),
    ],
)
def test_legibility_sees(chromium: Browser, report: Path, style: str, said: str) -> None:
    with opened(chromium, report, 390) as page:
        page.add_style_tag(content=style)
        assert any(said in problem for problem in problems(page)), problems(page)[:5]
