"""Overlap of masks, always beside what masks without anything in common would show.

Two nulls: a uniformly random mask of the second's size, as in the literature, and a random mask with the second's count
in every tensor and bin of |w|. bf16 rounding lets small weights change in every run, so masks of unrelated runs overlap
far more than the first null says; only an excess over the second speaks of shared structure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import subnet_kernels
from subnet_ft.errors import MaskError
from subnet_ft.masks.magnitude import NUM_BINS, magnitude_bins

if TYPE_CHECKING:
    from subnet_ft.checkpoints import Checkpoint
    from subnet_ft.masks import SubnetMask, TensorMask

# Weights per piece: a multiple of 8, so that pieces meet at a byte of the masks.
_CHUNK = 1 << 20


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
    excess: float | None = None
    """How far the common weights go from the magnitude-matched null's expectation, 0, to the smaller mask lying wholly
    in the larger, 1; negative below the null. A lift is bounded where the null is high, this is not. `None` without a
    base."""


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


def mask_overlap(
    first: SubnetMask,
    second: SubnetMask,
    *,
    base: Checkpoint | None = None,
    names: tuple[str, str] = ("first", "second"),
    progress: bool = False,
) -> MaskOverlap:
    """Compare two masks; the arguments, errors and sources are those of `overlap_matrix`.

    Args:
        first: One mask.
        second: Another mask of the same model.
        base: The base model of both, for the magnitude-matched null.
        names: What to call the two.
        progress: Show a progress bar on standard error.
    """
    return _overlaps(list(zip(names, (first, second), strict=True)), base, progress=progress)[0]


def overlap_matrix(
    masks: Mapping[str, SubnetMask], base: Checkpoint | None = None, *, progress: bool = False
) -> list[MaskOverlap]:
    """Compare every two of several masks, in the given order; the base is read once, piece by piece.

    Args:
        masks: Name to mask.
        base: The base model of all, for the magnitude-matched null; cast as the masks were compared, and checked
            against every mask's record of it.
        progress: Show a progress bar on standard error.

    Raises:
        MaskError: There are fewer than two masks.
        MaskMismatchError: The masks have different tensors, shapes or bases, or `base` is not theirs.

    Source: Mukherjee et al. 2025 (arXiv 2505.11711) for o1, o2 and the uniform null. Under either null the number of
    common weights is hypergeometric: n weights of which the masks have k1 and k2 give k1 k2 / n in the mean and k1 k2
    (n - k1) (n - k2) / (n^2 (n - 1)) as variance; n is the model for the uniform null, and for the magnitude-matched
    null, summed, every bin of |w| (`magnitude_bins`) of every tensor.
    """
    return _overlaps(list(masks.items()), base, progress=progress)


@dataclass
class _Counts:
    """What one pair of masks has in one tensor, or summed over tensors."""

    first: int = 0
    second: int = 0
    both: int = 0
    num_elements: int = 0
    expected: float = 0.0
    variance: float = 0.0

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(*(getattr(self, key.name) + getattr(other, key.name) for key in fields(self)))

    def overlap(self, *, has_magnitude: bool) -> Overlap:
        uniform = _hypergeometric(self.num_elements, self.first, self.second)
        expected, deviation = float(uniform[0]), math.sqrt(uniform[1])
        magnitude = (self.expected, math.sqrt(self.variance)) if has_magnitude else (None, None)
        room = min(self.first, self.second) - self.expected
        return Overlap(
            o1=_share(self.both, self.first),
            o2=_share(self.both, self.second),
            jaccard=_share(self.both, self.first + self.second - self.both),
            lift=_share(self.both, expected),
            magnitude_lift=_share(self.both, magnitude[0]),
            count_first=self.first,
            count_second=self.second,
            count_both=self.both,
            num_parameters=self.num_elements,
            uniform_o1=_share(expected, self.first),
            uniform_o2=_share(expected, self.second),
            uniform_o1_se=_share(deviation, self.first),
            uniform_o2_se=_share(deviation, self.second),
            magnitude_o1=_share(magnitude[0], self.first),
            magnitude_o2=_share(magnitude[0], self.second),
            magnitude_o1_se=_share(magnitude[1], self.first),
            magnitude_o2_se=_share(magnitude[1], self.second),
            excess=(self.both - self.expected) / room if has_magnitude and room > 0 else None,
        )


def _overlaps(named: list[tuple[str, SubnetMask]], base: Checkpoint | None, *, progress: bool) -> list[MaskOverlap]:
    from tqdm import tqdm

    masks = [mask for _, mask in named]
    _check(masks, base)
    pairs = list(combinations(range(len(masks)), 2))
    counts: dict[tuple[int, int], dict[str, _Counts]] = {pair: {} for pair in pairs}
    bar = tqdm(
        total=masks[0].num_parameters, desc="Comparing masks", unit="weight", unit_scale=True, disable=not progress
    )
    with bar:
        for name, bins in _bins_by_tensor(masks, base, bar.update):
            tensors = [mask.tensors[name] for mask in masks]
            for first, second in pairs:
                left, right = tensors[first], tensors[second]
                expected = variance = np.zeros(())
                if bins is not None:
                    expected, variance = _hypergeometric(bins[0], bins[1 + first], bins[1 + second])
                both = _common(left, right)
                counts[first, second][name] = _Counts(
                    left.count, right.count, both, left.num_elements, float(expected.sum()), float(variance.sum())
                )
            bar.update(0 if base else tensors[0].num_elements)
    has_magnitude = base is not None
    return [
        MaskOverlap(
            named[first][0],
            named[second][0],
            sum(by_tensor.values(), _Counts()).overlap(has_magnitude=has_magnitude),
            {name: entry.overlap(has_magnitude=has_magnitude) for name, entry in by_tensor.items()},
        )
        for (first, second), by_tensor in counts.items()
    ]


def _check(masks: list[SubnetMask], base: Checkpoint | None) -> None:
    if len(masks) < 2:
        raise MaskError(f"An overlap needs two masks or more, got {len(masks)}.")
    recorded = next((mask for mask in masks if mask.provenance.base is not None), masks[0])
    for mask in masks:
        masks[0].check_shapes({name: tensor.shape for name, tensor in mask.tensors.items()})
        recorded.check_same_base(mask)
    if base is not None:
        masks[0].check_shapes({name: spec.shape for name, spec in base.specs.items()})


def _bins_by_tensor(
    masks: list[SubnetMask], base: Checkpoint | None, advance: Callable[[int], object]
) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.int64]] | None]]:
    """Yield every tensor with its (1 + M, bins) counts: of all weights and of every mask's; `None` without a base."""
    if base is None:
        yield from ((name, None) for name in masks[0].names)
        return
    # One record stands for all: `_check` saw that they agree.
    recorded = next((mask for mask in masks if mask.provenance.base is not None), masks[0])
    compared_in = recorded.provenance.compare_dtype
    for name, pieces in base.pieces(_CHUNK, masks[0].names):
        counts = np.zeros((1 + len(masks), NUM_BINS), dtype=np.int64)
        tensors = [mask.tensors[name] for mask in masks]
        start, sums, dtype = 0, (0, 0), base.specs[name].dtype
        for piece in pieces:
            weights = piece if compared_in is None else piece.to(getattr(torch, compared_in))
            dtype = weights.dtype
            found = subnet_kernels.fingerprint(weights, offset=start)
            sums = ((sums[0] + found[0]) % 2**64, (sums[1] + found[1]) % 2**64)
            bins = magnitude_bins(weights)
            counts[0] += np.bincount(bins, minlength=NUM_BINS)
            for row, tensor in enumerate(tensors, 1):
                if tensor.count:
                    bits = tensor.bits[start // 8 : (start + bins.size + 7) // 8]
                    chosen = subnet_kernels.unpack_bits(bits, bins.size).numpy()
                    counts[row] += np.bincount(bins[chosen], minlength=NUM_BINS)
            start += bins.size
            advance(bins.size)
        recorded.check_fingerprint(name, dtype, sums)
        yield name, counts


def _common(left: TensorMask, right: TensorMask) -> int:
    """Count the weights that are trainable in both masks of a tensor, piece by piece."""
    if not (left.count and right.count):
        return 0
    pieces = (slice(start, start + _CHUNK) for start in range(0, left.bits.numel(), _CHUNK))
    return sum(subnet_kernels.count_bits(left.bits[piece] & right.bits[piece]) for piece in pieces)


def _hypergeometric(n: Any, k1: Any, k2: Any) -> tuple[Any, Any]:
    """Return mean and variance of the common members of two random subsets, elementwise; 0 where n is 0."""
    n, k1, k2 = (np.asarray(value, dtype=np.float64) for value in (n, k1, k2))
    members, others = np.maximum(n, 1), np.maximum(n - 1, 1)
    return k1 * k2 / members, k1 * k2 * (n - k1) * (n - k2) / (members**2 * others)


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
