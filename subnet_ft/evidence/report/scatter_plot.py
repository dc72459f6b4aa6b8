"""The drawing of a two-dimensional histogram of changes."""

from __future__ import annotations

import math

from subnet_ft.evidence.report.axes import Scale
from subnet_ft.evidence.report.svg import Svg
from subnet_ft.evidence.report.wording import percent, tolerance_text, typographic
from subnet_ft.evidence.scatter import RunScatter, Scatter

LEVELS = 6
"""Shades, by the logarithm of a bin's count."""


def scatter_panel(scatter: Scatter, run: RunScatter, title: str, style: str, width: float) -> str:
    """Draw one run: the full run's change to the right, its own upwards, darker where more weights lie."""
    left, top, bottom = 14.0, 20.0, 36.0
    side = width - left - 8.0
    svg = Svg(width, side + top + bottom, title)
    bins = scatter.num_bins
    x, y = Scale(0, bins, left, left + side), Scale(0, bins, top + side, top)
    most = max((count for row in run.counts for count in row), default=0)
    shades: list[list[tuple[float, float, float, float]]] = [[] for _ in range(LEVELS)]
    for row, counts in enumerate(run.counts):
        for column, count in enumerate(counts):
            if count:
                # The same factor from shade to shade; a single weight still shows.
                share = math.log(count) / math.log(most) if most > 1 else 1.0
                shades[min(int(share * LEVELS), LEVELS - 1)].append(
                    (x(column), y(row + 1), x(column + 1) - x(column), y(row) - y(row + 1))
                )
    svg.note(f"{run.moved_both:,} weights changed in both, {percent(run.same_direction)} of them the same way")
    svg.rect(left, top, side, side, "cell-back")
    for level, cells in enumerate(shades):
        svg.cells(cells, f"shade {style}", opacity=(level + 1) / LEVELS)
    svg.line(x(0), y(bins / 2), x(bins), y(bins / 2), "axis-line")
    svg.line(x(bins / 2), y(0), x(bins / 2), y(bins), "axis-line")
    svg.line(x(0), y(0), x(bins), y(bins), "diagonal")
    svg.text(left, 13, "\u2191 its own change", "tick")
    limit = tolerance_text(f"{scatter.limit:.1e}", "0", digits=1)
    low, high = typographic(f"-{limit}"), typographic(f"+{limit}")
    for value, content, anchor in ((0, low, "start"), (bins / 2, "base", "middle"), (bins, high, "end")):
        svg.text(x(value), top + side + 14, content, "tick", anchor=anchor)
    svg.text(left + side, top + side + 30, "the full run\u2019s change \u2192", "tick", anchor="end")
    return svg.render()
