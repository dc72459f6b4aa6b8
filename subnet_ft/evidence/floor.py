"""The floor: how far two full runs lie from each other that differ in nothing but their seed of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from subnet_ft.evidence.overlap import MaskOverlap
from subnet_ft.evidence.statistics import PairedDifference, paired_difference
from subnet_ft.evidence.weights import RunWeights, WeightComparison, compare_weights

if TYPE_CHECKING:
    from subnet_ft.checkpoints import Checkpoint


@dataclass(frozen=True)
class Floor:
    """Two full runs of one recipe with different seeds of training; what they do not share, no subnetwork could."""

    seeds: tuple[int, int]
    """Seed of the full run, and of the second one."""
    weights: WeightComparison
    """The second full run against the base and the first: identity inside what the first changed, and distance."""
    overlap: MaskOverlap | None
    """What the two changed, beside both nulls; `None` where their masks were not made."""
    accuracy: PairedDifference | None
    """The second minus the first on the same prompts; `None` without evaluation."""


def floor(
    base: Checkpoint,
    full: Checkpoint,
    second: Checkpoint,
    *,
    seeds: tuple[int, int],
    overlap: MaskOverlap | None,
    records: Sequence[Mapping[str, Any]] | None,
    second_records: Sequence[Mapping[str, Any]] | None,
    dtype: str | None = None,
    confidence: float = 0.95,
) -> Floor:
    """Compare two full runs.

    Args:
        base: The base checkpoint.
        full: The full run.
        second: The full run with the other seed.
        seeds: Of the two.
        overlap: Of the masks of what the two changed.
        records: What the full run answered to the held-out prompts.
        second_records: What the second answered to the same ones.
        dtype: Cast every weight to it first.
        confidence: Of the interval of the difference.
    """
    weights = compare_weights(base, full, {"second": RunWeights(second)}, dtype=dtype)["second"]
    accuracy = None
    if records and second_records:
        first, other = (np.array([bool(entry["correct"]) for entry in found]) for found in (records, second_records))
        accuracy = paired_difference(other, first, confidence=confidence)
    return Floor(seeds, weights, overlap, accuracy)
