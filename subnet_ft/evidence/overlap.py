"""Overlap of masks, always beside what masks without anything in common would show.

Two nulls: a uniformly random mask of the second's size, as in the literature, and a random mask with the second's count
in every tensor and bin of |w|. bf16 rounding lets small weights change in every run, so masks of unrelated runs overlap
far more than the first null says; only an excess over the second speaks of shared structure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Overlap:
    """How much two masks have in common, over the whole model or in one tensor.

    Shares are `None` where they have no denominator. A null replaces the second mask for o1 and the first for o2 by a
    random one; its share is an expectation, and `_se` the standard deviation of one draw around it.
    """

    o1: float | None
    """|first and second| / |first|."""
    o2: float | None
    """|first and second| / |second|."""
    jaccard: float | None
    """|first and second| / |first or second|."""
    lift: float | None
    """|first and second| over its expectation under the uniform null; 1: nothing in common."""
    magnitude_lift: float | None
    """The same over the magnitude-matched null; `None` without a base."""
    count_first: int
    """Trainable weights of the first mask."""
    count_second: int
    """Trainable weights of the second mask."""
    count_both: int
    """Weights trainable in both."""
    num_parameters: int
    """Weights in all, tied ones once."""
    uniform_o1: float | None
    """o1 under the uniform null: the second mask's density; a tensor's own in that tensor's row."""
    uniform_o2: float | None
    """o2 under the uniform null: the first mask's density."""
    uniform_o1_se: float | None
    """Standard deviation of o1 under the uniform null."""
    uniform_o2_se: float | None
    """Standard deviation of o2 under the uniform null."""
    magnitude_o1: float | None
    """o1 under the magnitude-matched null; `None` without a base."""
    magnitude_o2: float | None
    """o2 under the magnitude-matched null; `None` without a base."""
    magnitude_o1_se: float | None
    """Standard deviation of o1 under the magnitude-matched null."""
    magnitude_o2_se: float | None
    """Standard deviation of o2 under the magnitude-matched null."""


@dataclass(frozen=True)
class MaskOverlap:
    """The overlap of two masks of one base."""

    first: str
    """Name of the first mask."""
    second: str
    """Name of the second mask."""
    overall: Overlap
    """Over all weights."""
    by_tensor: dict[str, Overlap]
    """Parameter name to the overlap in that tensor, with the tensor's own nulls."""
