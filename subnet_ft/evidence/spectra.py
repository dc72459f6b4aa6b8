"""Spectra of updates: rank as the literature reports it, and the figures that tell more than a rank does.

The rank of any sparse random matrix is nearly full, so a full rank alone says nothing. Beside it stand stable rank,
energy rank and the share of the base weight's principal directions, and the same figures of a control's delta.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one matrix of delta = tuned - base, in float32, and where its main directions lie.

    Figures are `None` for a delta of zeros.
    """

    name: str
    """Parameter name; `NAME[3]` is the fourth matrix of a stack."""
    shape: list[int]
    """Rows and columns."""
    num_changed: int
    """Entries of delta that are not zero."""
    rank: int
    """Singular values above max(rows, columns) * eps * the largest: `torch.linalg.matrix_rank` with its default."""
    rank_share: float
    """`rank` over min(rows, columns)."""
    stable_rank: float | None
    """Squared Frobenius norm over squared spectral norm."""
    energy_rank_99: int | None
    """Fewest singular values that hold 99 % of the squared Frobenius norm."""
    principal_rank: int
    """k, the number of leading directions that `principal_overlap` compares."""
    principal_overlap: float | None
    """Mean squared cosine between the leading k left (right) singular directions of delta and the base weight's leading
    k-dimensional subspace, the mean of left and right: 0 orthogonal, 1 inside."""
    principal_expected: float
    """The same for random directions: the mean of k / rows and k / columns."""
    profile: list[float]
    """Singular values over the largest, at evenly spaced places from the first to the last; empty for zeros."""
    control: Spectrum | None = field(default=None)
    """The same figures of the control's delta."""


@dataclass(frozen=True)
class Spectra:
    """The spectra of a run's delta."""

    matrices: list[Spectrum]
    """In the model's order."""
    sampled: bool
    """Whether only a few layers were looked at: the first, the middle and the last of every kind."""
    control: str
    """`run`: the control is a run of its own. `shuffled`: the delta's own entries in random order inside every bin of
    |w|, whose places are a magnitude-matched control mask."""
    skipped: dict[str, str]
    """Matrices that were left out of those wanted, each with the reason."""
