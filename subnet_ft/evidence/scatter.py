"""Weight by weight: what a run changed against what the full run changed, as a histogram of two axes.

The base is the origin. Weights on the diagonal moved as in the full run, those on the horizontal axis did not move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

import subnet_kernels
from subnet_ft.evidence.weights import RunWeights, check_dtype, check_specs
from subnet_kernels import bits_view

if TYPE_CHECKING:
    from subnet_ft.checkpoints import Checkpoint

# Weights per piece: a multiple of 8, so that pieces meet at a byte of the masks.
_CHUNK = 1 << 20
# Share of the full run's changes that the axes cover.
_COVERED = 0.995


@dataclass(frozen=True)
class RunScatter:
    """The weights of one run's mask by their two changes."""

    counts: list[list[int]]
    """Row: bin of the run's change, the lowest first; column: bin of the full run's."""
    num_weights: int
    """Weights of the run's mask; `counts` and `outside` add up to it."""
    outside: int
    """Weights that changed by more than the axes' limit, in either run."""
    moved_run: int
    """Weights whose bits this run changed."""
    moved_full: int
    """Weights whose bits the full run changed."""
    moved_both: int
    """Weights whose bits both changed."""
    same_direction: float | None
    """Share of those that both changed the same way; `None` without any."""
    cosine: float | None
    """Cosine of the angle between the two changes as vectors over the mask; `None` where one is zero or not finite."""


@dataclass(frozen=True)
class Scatter:
    """Changes of several runs against the full run's, on equal axes."""

    limit: float
    """Both axes go from -limit to limit, in units of a weight: 99.5 % of the weights that the full run changed lie
    within."""
    num_bins: int
    """Bins of an axis, an odd number of equal width: zero lies in the middle of one."""
    runs: dict[str, RunScatter]
    """By name."""


def weight_scatter(
    base: Checkpoint,
    full: Checkpoint,
    runs: Mapping[str, RunWeights],
    *,
    dtype: str | None = None,
    num_bins: int = 41,
    progress: bool = False,
) -> Scatter | None:
    """Count every weight of every run's mask by its change and the full run's; subtraction is in float32.

    Base and full run are read twice, once for the axes. Memory is a few pieces of a million weights of each checkpoint.

    Args:
        base: The base checkpoint.
        full: The full run's checkpoint.
        runs: Name to checkpoint and mask.
        dtype: Cast every weight to `bfloat16`, `float16` or `float32` first, as `compare_weights` does.
        num_bins: Bins of an axis, odd.
        progress: Show a progress bar on standard error.

    Returns:
        `None` where the full run changed no weight.

    Raises:
        CheckpointMismatchError: Names or shapes differ between checkpoints, or dtypes do and `dtype` is `None`.
        MaskMismatchError: A mask has other tensors or shapes.
        ValueError: A run has no mask, `num_bins` is not odd, or `dtype` is unknown.
    """
    from tqdm import tqdm

    check_dtype(dtype)
    if num_bins < 3 or num_bins % 2 == 0:
        raise ValueError(f"`num_bins` must be odd and at least 3, got {num_bins}.")
    counting = {}
    for name, run in runs.items():
        if run.mask is None:
            raise ValueError(f"`{name}` has no mask; a scatter is over the weights of one.")
        run.mask.check_shapes({parameter: spec.shape for parameter, spec in base.specs.items()})
        counting[name] = _Counting(num_bins)
    checkpoints = [base, full, *(run.checkpoint for run in runs.values())]
    for checkpoint in checkpoints[1:]:
        check_specs(base, checkpoint, any_dtype=dtype is not None)
    total = 2 * sum(math.prod(spec.shape) for spec in base.specs.values())
    with tqdm(total=total, desc="Comparing changes", unit="weight", unit_scale=True, disable=not progress) as bar:
        limit = _limit(_pieces(checkpoints[:2], dtype, bar.update))
        if limit is None:
            return None
        for parameter, start, parts in _pieces(checkpoints, dtype, bar.update):
            for (name, run), values in zip(runs.items(), parts[2:], strict=True):
                assert run.mask is not None
                tensor = run.mask.tensors[parameter]
                if tensor.count:
                    bits = tensor.bits[start // 8 : (start + len(values) + 7) // 8]
                    inside = subnet_kernels.unpack_bits(bits, len(values))
                    counting[name].add(parts[0][inside], parts[1][inside], values[inside], limit)
    return Scatter(limit, num_bins, {name: found.scatter() for name, found in counting.items()})


class _Counting:
    """Counts of one run."""

    def __init__(self, num_bins: int) -> None:
        self.num_bins = num_bins
        self.counts: NDArray[np.int64] = np.zeros(num_bins * num_bins, dtype=np.int64)
        self.num_weights = self.outside = self.moved_run = self.moved_full = self.moved_both = self.same = 0
        self.products = [0.0, 0.0, 0.0]

    def add(self, base: torch.Tensor, full: torch.Tensor, run: torch.Tensor, limit: float) -> None:
        """Add weights; all are flat and of one length and dtype."""
        moved_full, moved_run = bits_view(full) != bits_view(base), bits_view(run) != bits_view(base)
        both = moved_full & moved_run
        self.num_weights += len(base)
        self.moved_full += int(moved_full.sum())
        self.moved_run += int(moved_run.sum())
        self.moved_both += int(both.sum())
        x, y = (full.float() - base.float()).double(), (run.float() - base.float()).double()
        self.same += int((both & (x * y > 0)).sum())
        for index, product in enumerate((x * y, x * x, y * y)):
            self.products[index] += float(product.sum())
        within = (x.abs() <= limit) & (y.abs() <= limit)  # False for NaN, too
        self.outside += len(base) - int(within.sum())
        column, row = self._bins(x[within], limit), self._bins(y[within], limit)
        self.counts += np.bincount((row * self.num_bins + column).numpy(), minlength=len(self.counts))

    def _bins(self, values: torch.Tensor, limit: float) -> torch.Tensor:
        # Rounding to the nearest bin's centre treats both signs alike.
        half = self.num_bins // 2
        return (values * (self.num_bins / (2 * limit))).round().clamp(-half, half).long() + half

    def scatter(self) -> RunScatter:
        xy, xx, yy = self.products
        norm = math.sqrt(xx) * math.sqrt(yy)
        return RunScatter(
            counts=self.counts.reshape(self.num_bins, self.num_bins).tolist(),
            num_weights=self.num_weights,
            outside=self.outside,
            moved_run=self.moved_run,
            moved_full=self.moved_full,
            moved_both=self.moved_both,
            same_direction=self.same / self.moved_both if self.moved_both else None,
            cosine=xy / norm if math.isfinite(norm) and norm > 0 else None,
        )


def _pieces(
    checkpoints: list[Checkpoint], dtype: str | None, advance: Callable[[int], object]
) -> Iterator[tuple[str, int, list[torch.Tensor]]]:
    """Yield every parameter's name, a start and that piece of every checkpoint."""
    names = list(checkpoints[0].specs)
    for items in zip(*(checkpoint.pieces(_CHUNK, names) for checkpoint in checkpoints), strict=True):
        start = 0
        for parts in zip(*(pieces for _, pieces in items), strict=True):
            yield (
                items[0][0],
                start,
                [part if dtype is None else part.to(getattr(torch, dtype)) for part in parts],
            )
            start += len(parts[0])
            advance(len(parts[0]))


def _limit(pieces: Iterator[tuple[str, int, list[torch.Tensor]]]) -> float | None:
    """Return the size of change that `_COVERED` of the changed weights do not exceed, to within a hundredth."""
    # Sizes are counted by the upper half of their float32 bits: exponent and seven bits of the mantissa.
    counts = np.zeros(1 << 15, dtype=np.int64)
    for _, _, (base, full) in pieces:
        changed = bits_view(full) != bits_view(base)
        size = (full[changed].float() - base[changed].float()).abs()
        size = size[torch.isfinite(size) & (size > 0)]
        counts += np.bincount((size.view(torch.int32) >> 16).numpy(), minlength=len(counts))
    total = int(counts.sum())
    if not total:
        return None
    last = int(np.searchsorted(np.cumsum(counts), _COVERED * total))
    return float(np.array([(last + 1) << 16], dtype=np.int32).view(np.float32)[0])
