"""What the drawings share: scales, axes and the layout of rows.

Each drawing is drawn for one width, so that text keeps its size on a phone. Colours come from CSS classes:
`m-base`, `m-full`, `m-subnet`, `m-control-1`, ... set `--c`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.svg import Svg
from subnet_ft.evidence.report.wording import typographic

NARROW = 480.0
TOP = 8.0
_AXIS = 26.0


@dataclass(frozen=True)
class Scale:
    """A linear map from values to positions."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return self.start + share * (self.end - self.start)


def css_class(report: Report, name: str) -> str:
    """Return the class that colours a model."""
    roles = {report.base: "m-base", report.full: "m-full", report.subnet: "m-subnet"}
    if name in roles:
        return roles[name]
    # By name, so that a control keeps its colour whichever speaks most against the subnetwork.
    others = [*sorted(report.controls), *sorted(report.baselines)]
    return f"m-control-{others.index(name) % 6 + 1}"


def rows_over_axis(
    width: float, count: int, ticks: list[float], write: Callable[[float], str], title: str, *, right: float
) -> tuple[Svg, Scale]:
    """Start a drawing with one row per model over a horizontal axis."""
    bottom = bottom_of_rows(width, count)
    svg = Svg(width, bottom + _AXIS, title)
    x = Scale(ticks[0], ticks[-1], left_edge(width), width - right - 12)
    for tick in ticks:
        svg.line(x(tick), TOP, x(tick), bottom, "grid")
        content = write(tick)
        # A long label at an end stays in the drawing: half of it is at most four units for each sign.
        centre = min(max(x(tick), 4.0 * len(content)), width - 4.0 * len(content))
        svg.text(centre, bottom + 17, content, "tick", anchor="middle")
    return svg, x


def upright(
    width: float, height: float, ticks: list[float], write: Callable[[float], str], title: str
) -> tuple[Svg, Scale]:
    """Start a drawing with a vertical axis."""
    svg = Svg(width, height, title)
    y = Scale(ticks[0], ticks[-1], height - 28, 16)
    for tick in ticks:
        svg.line(48, y(tick), width - 8, y(tick), "grid")
        svg.text(40, y(tick) + 4, write(tick), "tick", anchor="end")
    return svg, y


def bottom_of_rows(width: float, rows: int) -> float:
    return TOP + _row_height(width) * rows


def row_centre(width: float, row: int) -> float:
    return TOP + _row_height(width) * (row + (0.7 if width < NARROW else 0.5))


def row_label(svg: Svg, text: str, y: float) -> None:
    svg.text(0, y - 15 if svg.width < NARROW else y + 4, text, "name")


def left_edge(width: float) -> float:
    """Return where marks start; on a phone the name stands above its row instead of beside it."""
    return 14.0 if width < NARROW else 200.0


def _row_height(width: float) -> float:
    return 50.0 if width < NARROW else 34.0


def percent_tick(value: float) -> str:
    """Write a share at an axis."""
    return f"{round(value * 100, 6):g} %"


def points_tick(value: float) -> str:
    """Write a difference in points at an axis."""
    return typographic(f"{round(value * 100, 6):+g}") if value else "0"
