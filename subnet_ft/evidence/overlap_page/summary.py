"""Overlaps in short: what `mask overlap --json` prints and what a terminal shows, and the tables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from subnet_ft.evidence.overlap import MaskOverlap, Overlap
from subnet_ft.evidence.report.summary import aligned
from subnet_ft.evidence.report.tables import Table
from subnet_ft.evidence.report.wording import MISSING, percent

NULLS = (
    "o1 is the common weights' share of the first mask, o2 of the second. The uniform null replaces a mask by random "
    "weights, the magnitude-matched null by random weights of the same tensor and the same bin of |w|: rounding to "
    "bfloat16 lets small weights change in every run, so only what exceeds the second null speaks of shared structure. "
    "A lift is the common weights over what a null expects; the excess is the way from the magnitude-matched null (0) "
    "to the smaller mask lying wholly in the larger (100 %)."
)
"""What a reader must know to judge an overlap."""


def summary_for_cli(overlaps: Sequence[MaskOverlap], version: str) -> dict[str, Any]:
    """Return the object of `mask overlap --json`.

    Two masks give their figures at the top and by tensor, more give one entry per pair under `pairs`.
    """
    if len(overlaps) == 1:
        (pair,) = overlaps
        tensors = {name: asdict(entry) for name, entry in pair.by_tensor.items()}
        return {"version": version, **_pair(pair), "tensors": tensors}
    return {"version": version, "pairs": [_pair(pair) for pair in overlaps]}


def lines_for_terminal(overlaps: Sequence[MaskOverlap]) -> list[str]:
    """Return one line per pair under a header."""
    return aligned(pairs_table(overlaps))


def pairs_table(overlaps: Sequence[MaskOverlap]) -> Table:
    """Every pair beside both nulls."""
    return _table({f"{pair.first}, {pair.second}": pair.overall for pair in overlaps}, "first, second")


def tensors_table(overlap: MaskOverlap) -> Table:
    """One pair tensor by tensor; both nulls are the tensor's own."""
    return _table(overlap.by_tensor, "")


def _table(rows: dict[str, Overlap], corner: str) -> Table:
    header = [
        corner,
        "o1 / o2 %",
        "uniform null",
        "magnitude null",
        "Jaccard",
        "lift",
        "over magnitude",
        "excess",
    ]
    return Table(
        header,
        [
            [
                name,
                _both(entry.o1, entry.o2),
                _both(entry.uniform_o1, entry.uniform_o2),
                _both(entry.magnitude_o1, entry.magnitude_o2),
                percent(entry.jaccard),
                _times(entry.lift),
                _times(entry.magnitude_lift),
                percent(entry.excess),
            ]
            for name, entry in rows.items()
        ],
    )


def _both(first: float | None, second: float | None) -> str:
    return " / ".join(MISSING if share is None else f"{share * 100:.1f}" for share in (first, second))


def _times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f}"


def _pair(pair: MaskOverlap) -> dict[str, Any]:
    return {"first": pair.first, "second": pair.second, **asdict(pair.overall)}
