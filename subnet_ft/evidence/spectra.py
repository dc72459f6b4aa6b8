"""Spectra of updates: rank as the literature reports it, and the figures that tell more than a rank does.

The rank of any sparse random matrix is nearly full, so a full rank alone says nothing. Beside it stand stable rank,
energy rank and the share of the base weight's principal directions, and the same figures of a control's delta.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from subnet_ft.evidence.weights import check_dtype, check_specs
from subnet_ft.masks.density import layer_and_kind
from subnet_ft.masks.magnitude import magnitude_bins

if TYPE_CHECKING:
    from subnet_ft.checkpoints import Checkpoint

# Share of the smaller side that counts as leading directions.
_PRINCIPAL_SHARE = 0.05
# From this ratio of sides on, embeddings mostly, the Gram matrix is decomposed instead of the matrix.
_ELONGATED = 8
_GRAM_ROWS = 1 << 14
_LARGEST = 1 << 27
_PROFILE = 33


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
    method: str
    """`svd`, or `gram` for matrices eight times as long as wide: through the float64 Gram matrix."""
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


def delta_spectra(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    which: str = "sampled",
    control: Checkpoint | None = None,
    dtype: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Spectra:
    """Decompose what a run added to every matrix; subtraction is in float32.

    Memory is a few float32 copies of one matrix.

    Args:
        base: The base checkpoint.
        tuned: The run's checkpoint.
        which: `sampled`: of every kind of matrix the first, the middle and the last layer, and of stacked experts the
            first, the middle and the last. `all`: every matrix.
        control: The checkpoint of the magnitude-matched control's run. Without one the control is the delta itself,
            its entries in random order inside every bin of |w|.
        dtype: Cast all weights to `bfloat16`, `float16` or `float32` first, where they are stored in several.
        seed: Seed of that order, with each parameter's name.
        progress: Show a progress bar on standard error.

    Raises:
        CheckpointMismatchError: Names or shapes differ between checkpoints, or dtypes do and `dtype` is `None`.
        ValueError: `which` or `dtype` is unknown.

    Source: rank as in Mukherjee et al. 2025 (arXiv 2505.11711); principal directions after Zhu et al. 2025 (arXiv
    2511.08567), who find updates of RL off them.
    """
    from tqdm import tqdm

    if which not in ("sampled", "all"):
        raise ValueError(f"`which` must be `sampled` or `all`, got {which!r}.")
    check_dtype(dtype)
    for checkpoint in (tuned, *([control] if control else [])):
        check_specs(base, checkpoint, any_dtype=dtype is not None)
    shapes = {name: tuple(spec.shape) for name, spec in base.specs.items()}
    wanted = _wanted(shapes, is_sampled=which == "sampled")
    skipped = {name: reason for name in wanted if (reason := _reason_to_skip(shapes[name])) is not None}
    names = [name for name in wanted if name not in skipped]
    matrices: list[Spectrum] = []
    streams = [checkpoint.tensors(names) for checkpoint in (base, tuned, *([control] if control else []))]
    with tqdm(
        total=sum(_work(shapes[name], len(wanted[name])) for name in names),
        desc="Decomposing deltas",
        unit="flop",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for items in zip(*streams, strict=True):
            name = items[0][0]
            stacks = [tensor if tensor.dim() == 3 else tensor.unsqueeze(0) for _, tensor in items]
            for index in wanted[name]:
                weight, *others = (_float32(stack[index], dtype) for stack in stacks)
                label = f"{name}[{index}]" if len(shapes[name]) == 3 else name
                deltas = [other - weight for other in others]
                if not all(bool(torch.isfinite(part).all()) for part in (weight, *deltas)):
                    skipped[label] = "holds NaN or infinite weights"
                else:
                    if control is None:
                        deltas.append(shuffled_delta(deltas[0], weight, [seed, zlib.crc32(label.encode())]))
                    matrices.append(_spectrum(label, weight, *deltas))
                bar.update(_work(shapes[name], 1))
    return Spectra(matrices, which == "sampled", "run" if control else "shuffled", skipped)


def shuffled_delta(delta: torch.Tensor, weight: torch.Tensor, seed: list[int]) -> torch.Tensor:
    """Return a delta's entries in random order inside every bin of |weight|; float32 of the same shape.

    Where it is not zero is a magnitude-matched control mask, and its entries are as large as the delta's own there.
    """
    bins = magnitude_bins(weight.reshape(-1))
    places = np.random.default_rng(seed).permutation(bins.size)
    # A stable sort keeps the random order inside a bin.
    places = places[np.argsort(bins[places], kind="stable")]
    shuffled = np.empty(bins.size, dtype=np.float32)
    shuffled[places] = delta.reshape(-1).numpy()[np.argsort(bins, kind="stable")]
    return torch.from_numpy(shuffled).view(delta.shape)


@dataclass(frozen=True)
class _Parts:
    """Singular values (min(m, n),) and the leading directions, left (m, k) and right (n, k)."""

    values: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


def _spectrum(name: str, weight: torch.Tensor, delta: torch.Tensor, control: torch.Tensor) -> Spectrum:
    rank = max(1, round(_PRINCIPAL_SHARE * min(weight.shape)))
    # Only the leading directions are wanted of the weight: its Gram matrix is exact enough and much faster.
    principal = _by_gram(weight, rank)
    return _figures(name, delta, principal, _figures(name, control, principal, None))


def _figures(name: str, delta: torch.Tensor, principal: _Parts, control: Spectrum | None) -> Spectrum:
    num_rows, num_columns = delta.shape
    smaller, larger = sorted(delta.shape)
    wanted = principal.left.shape[1]
    by_gram = larger >= _ELONGATED * smaller
    rank, values = 0, torch.zeros(smaller)
    energy_rank = overlap = stable_rank = None
    if bool(delta.any()):
        parts = _by_gram(delta, wanted) if by_gram else _by_svd(delta, wanted)
        values = parts.values
        rank = int((values > larger * torch.finfo(torch.float32).eps * values[0]).sum())
        energy = values.double().square().cumsum(0)
        stable_rank = float(energy[-1] / energy[0])
        energy_rank = int((energy < 0.99 * energy[-1]).sum()) + 1
        overlap = _overlap(parts, principal, min(wanted, rank))
    places = np.linspace(0, smaller - 1, min(_PROFILE, smaller)).round().astype(int)
    return Spectrum(
        name=name,
        shape=[num_rows, num_columns],
        num_changed=int(delta.count_nonzero()),
        method="gram" if by_gram else "svd",
        rank=rank,
        rank_share=rank / smaller,
        stable_rank=stable_rank,
        energy_rank_99=energy_rank,
        principal_rank=wanted,
        principal_overlap=overlap,
        principal_expected=(wanted / num_rows + wanted / num_columns) / 2,
        profile=[float(value) for value in values[places] / values[0]] if rank else [],
        control=control,
    )


def _by_svd(matrix: torch.Tensor, num_leading: int) -> _Parts:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return _Parts(values, left[:, :num_leading], right[:num_leading].T)


def _by_gram(matrix: torch.Tensor, num_leading: int) -> _Parts:
    """Decompose through the float64 Gram matrix of the shorter side.

    Singular values come out to 1e-8 of the largest, far below the rank's tolerance of max(m, n) * 1.2e-7.
    """
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if is_wide else matrix
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for start in range(0, tall.shape[0], _GRAM_ROWS):
        part = tall[start : start + _GRAM_ROWS].double()
        gram.addmm_(part.T, part)
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.flip(0).clamp(min=0).sqrt().float()
    short = vectors.flip(1)[:, :num_leading].float()
    # Directions of a zero singular value are undefined; the caller leaves them out.
    long = tall @ short / values[:num_leading].clamp(min=torch.finfo(torch.float32).tiny)
    return _Parts(values, short, long) if is_wide else _Parts(values, long, short)


def _overlap(delta: _Parts, principal: _Parts, num_leading: int) -> float:
    """Return the mean squared cosine between delta's leading directions and the weight's leading subspaces."""
    sides = ((delta.left, principal.left), (delta.right, principal.right))
    cosines = (
        float((ours[:, :num_leading].T @ theirs).double().square().sum()) / num_leading for ours, theirs in sides
    )
    return sum(cosines) / 2


def _wanted(shapes: dict[str, tuple[int, ...]], *, is_sampled: bool) -> dict[str, list[int]]:
    """Return the parameters to look at, in the model's order, with the matrices of each stack."""
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    kinds: dict[str, list[str]] = {}
    for name in matrices:
        kinds.setdefault(layer_and_kind(name)[1], []).append(name)
    chosen = {name for names in kinds.values() for name in (_ends_and_middle(names) if is_sampled else names)}
    return {
        name: _ends_and_middle(list(range(shape[0] if len(shape) == 3 else 1)))
        if is_sampled
        else list(range(shape[0] if len(shape) == 3 else 1))
        for name, shape in matrices.items()
        if name in chosen
    }


T = TypeVar("T")


def _ends_and_middle(items: list[T]) -> list[T]:
    return [items[place] for place in sorted({0, len(items) // 2, len(items) - 1}) if items]


def _reason_to_skip(shape: tuple[int, ...]) -> str | None:
    if len(shape) > 3:
        return f"has {len(shape)} axes"
    if min(shape[-2:]) == 0:
        return "is empty"
    size = math.prod(shape[-2:])
    if size > _LARGEST:
        return f"is too large to decompose here: {size:,} weights, the limit is {_LARGEST:,}"
    return None


def _work(shape: tuple[int, ...], count: int) -> int:
    """Return what a decomposition costs, up to a factor."""
    smaller, larger = sorted(shape[-2:])
    return count * larger * smaller**2


def _float32(weights: torch.Tensor, dtype: str | None) -> torch.Tensor:
    return (weights.detach() if dtype is None else weights.detach().to(getattr(torch, dtype))).float()
