"""Drawings of overlaps: a matrix of masks, and every pair against its nulls."""

from __future__ import annotations

from collections.abc import Sequence

from subnet_ft.evidence.overlap import MaskOverlap, Overlap
from subnet_ft.evidence.report.axes import NARROW, percent_tick, row_centre, row_label, rows_over_axis
from subnet_ft.evidence.report.row_plots import Mark, Row, rows_plot, shorten
from subnet_ft.evidence.report.svg import Svg
from subnet_ft.evidence.report.wording import percent

_LONGEST_NAME = 17


def matrix_plot(overlaps: Sequence[MaskOverlap], width: float) -> str | None:
    """Share of every row's mask that lies in every column's, and under it what the null expects.

    The colour is `Overlap.excess`: none where the masks have no more in common than the null says.
    """
    names = list(dict.fromkeys(name for pair in overlaps for name in (pair.first, pair.second)))
    if not names:
        return None
    is_narrow = width < NARROW
    left, top = (104.0 if is_narrow else 150.0), 22.0
    cell = min((width - left) / len(names), 92.0)
    height = min(cell, 44.0) if cell >= 36 else 30.0
    svg = Svg(width, top + height * len(names), "Overlap of every two masks")
    by_pair = {(pair.first, pair.second): pair.overall for pair in overlaps}
    for row, name in enumerate(names):
        y = top + height * row
        longest = 11 if is_narrow else _LONGEST_NAME
        svg.text(left - 8, y + height / 2 + 4, f"{shorten(name, longest)}  {row + 1}", "tick", anchor="end")
        svg.text(left + cell * (row + 0.5), top - 8, str(row + 1), "tick", anchor="middle")
        for column, other in enumerate(names):
            x = left + cell * column
            svg.rect(x, y, cell - 1, height - 1, "cell-back")
            if name == other:
                continue
            is_first = (name, other) in by_pair
            entry = by_pair[(name, other) if is_first else (other, name)]
            share, null, kind = _against_null(entry, is_first=is_first)
            tip = f"{percent(share)} of {name} lies in {other}; {kind} null {percent(null)}"
            # Half the colour at most: the numbers must stay readable on it.
            svg.rect(x, y, cell - 1, height - 1, "cell", tip=tip, opacity=0.5 * max(entry.excess or 0.0, 0.0))
            centre, has_null = x + cell / 2, cell >= 36 and null is not None
            if share is not None:
                svg.text(
                    centre, y + height / 2 + (-2 if has_null else 4), f"{share * 100:.0f}", "name", anchor="middle"
                )
            if has_null and null is not None:
                svg.text(centre, y + height / 2 + 13, f"{null * 100:.0f}", "null", anchor="middle")
    return svg.render()


def nulls_plot(overlaps: Sequence[MaskOverlap], width: float) -> str | None:
    """o1 of every pair as a dot, its two nulls as rings; how far they scatter is less than a ring's width."""
    found = [(pair, pair.overall.o1) for pair in overlaps if pair.overall.o1 is not None]
    if not found:
        return None
    ticks = [0, 0.25, 0.5, 0.75, 1]
    svg, x = rows_over_axis(width, len(found), ticks, percent_tick, "o1 of every pair beside its nulls", right=58)
    for row, (pair, share) in enumerate(found):
        y = row_centre(width, row)
        row_label(svg, f"{shorten(pair.first, 12)}, {shorten(pair.second, 12)}", y)
        svg.line(x(0), y, x(1), y, "grid")
        for null, style, kind in (
            (pair.overall.uniform_o1, "ring m-base", "uniform"),
            (pair.overall.magnitude_o1, "ring m-control-1", "magnitude-matched"),
        ):
            if null is not None:
                svg.circle(x(null), y, 5.5, style, tip=f"{kind} null: {percent(null)}")
        svg.circle(x(share), y, 4.5, "dot m-subnet", tip=f"{percent(share)} of {pair.first} lies in {pair.second}")
        svg.text(width - 2, y + 4, percent(share), "value", anchor="end")
    return svg.render()


def others_plot(overlaps: Sequence[MaskOverlap], own: str, width: float) -> str | None:
    """Share of one mask that lies in every other one, beside what the nulls say; the names are those of the others."""
    rows = []
    for pair in overlaps:
        if own not in (pair.first, pair.second):
            continue
        is_first = pair.first == own
        found, other = pair.overall, pair.second if is_first else pair.first
        share = found.o1 if is_first else found.o2
        nulls = (
            ("m-base", "uniform null", found.uniform_o1 if is_first else found.uniform_o2),
            ("m-control-1", "magnitude-matched null", found.magnitude_o1 if is_first else found.magnitude_o2),
        )
        if share is not None:
            marks = [
                Mark(null, style, f"{other}, {name}: {percent(null)}")
                for style, name, null in nulls
                if null is not None
            ]
            tip = f"{other}: {percent(share)}"
            rows.append(Row(other, "m-subnet", share, percent(share), marks=marks, tip=tip))
    title = "Share of the mask that lies in each other mask"
    return rows_plot(rows, width, title=title, write=percent_tick, within=(0, 1), limits=(0, 1))


def _against_null(overlap: Overlap, *, is_first: bool) -> tuple[float | None, float | None, str]:
    share = overlap.o1 if is_first else overlap.o2
    matched = overlap.magnitude_o1 if is_first else overlap.magnitude_o2
    if matched is not None:
        return share, matched, "magnitude-matched"
    return share, overlap.uniform_o1 if is_first else overlap.uniform_o2, "uniform"
