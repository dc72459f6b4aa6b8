"""Drawings with one row per model or kind of matrix over a horizontal axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from subnet_ft.evidence.report.axes import NARROW, TOP, bottom_of_rows, row_centre, row_label, rows_over_axis
from subnet_ft.evidence.report.svg import nice_ticks

_LONGEST = {True: 44, False: 27}


@dataclass(frozen=True)
class Mark:
    """A dot, ring or thin line at a value."""

    value: float
    style: str
    tip: str = ""
    shape: str = "ring"
    """`ring`, `dot` or `small`."""


@dataclass(frozen=True)
class Row:
    """One row: a value with its interval or as a bar, and what stands beside it."""

    label: str
    style: str
    value: float | None
    text: str
    """At the right edge."""
    low: float | None = None
    high: float | None = None
    is_bar: bool = False
    marks: Sequence[Mark] = ()
    tip: str = ""


def rows_plot(
    rows: Sequence[Row],
    width: float,
    *,
    title: str,
    write: Callable[[float], str],
    within: Sequence[float] = (),
    limits: tuple[float, float] | None = None,
    band: tuple[float, float] | None = None,
    reference: float | None = None,
) -> str | None:
    """Draw rows over one axis.

    Args:
        rows: From top to bottom; nothing is drawn without any.
        width: Of the drawing.
        title: What it shows.
        write: Number to text at the axis.
        within: Values that the axis covers besides those of the rows.
        limits: Ends that the axis must not pass, such as 0 and 1.
        band: Interval that is shaded.
        reference: Value that has a line.
    """
    if not rows:
        return None
    values = [*within, *(band or ()), *([] if reference is None else [reference])]
    for row in rows:
        values += [value for value in (row.value, row.low, row.high) if value is not None]
        values += [mark.value for mark in row.marks]
    ticks = nice_ticks(min(values), max(values), 4 if width < NARROW else 7)
    if limits is not None:
        ticks = [tick for tick in ticks if limits[0] - 1e-9 <= tick <= limits[1] + 1e-9]
    right = 30.0 + 7.5 * max(len(row.text) for row in rows)
    svg, x = rows_over_axis(width, len(rows), ticks, write, title, right=right)
    bottom = bottom_of_rows(width, len(rows))
    if band is not None:
        start, end = x(max(band[0], x.low)), x(min(band[1], x.high))
        svg.rect(start, TOP, end - start, bottom - TOP, "band")
    if reference is not None:
        svg.line(x(reference), TOP, x(reference), bottom, "reference")
    for number, row in enumerate(rows):
        y = row_centre(width, number)
        row_label(svg, shorten(row.label, _LONGEST[width < NARROW]), y)
        if row.value is not None and row.is_bar:
            svg.rect(x(0), y - 8, x(row.value) - x(0), 16, f"bar {row.style}", tip=row.tip)
        if row.low is not None and row.high is not None:
            svg.line(x(row.low), y, x(row.high), y, f"whisker {row.style}")
        for mark in row.marks:
            if mark.shape == "ring":
                svg.circle(x(mark.value), y, 5.5, f"ring {mark.style}", tip=mark.tip)
            else:
                svg.circle(x(mark.value), y, 4.5 if mark.shape == "dot" else 2.5, f"dot {mark.style}", tip=mark.tip)
        if row.value is not None and not row.is_bar:
            svg.circle(x(row.value), y, 5, f"dot {row.style}", tip=row.tip)
        svg.text(width - 2, y + 4, row.text, "value", anchor="end")
    return svg.render()


def shorten(text: str, longest: int) -> str:
    """Leave out the middle of what is too long for a label."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}\u2026{text[head + 1 - longest :]}"
