"""Comparison of weights: what a run changed, and how much of the full run it reproduced.

Checkpoints are streamed side by side, each read once, whatever the number of runs. Most weights are untouched by
construction, so every share of identical weights comes three times: over the weights whose bits the full run changed,
over all weights, and for the base model itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from subnet_ft.checkpoints.listing import listing
from subnet_ft.errors import CheckpointMismatchError, MaskMismatchError
from subnet_ft.masks.provenance import COMPARE_DTYPES, narrowest_dtype
from subnet_kernels import bits_view

if TYPE_CHECKING:
    from subnet_ft.checkpoints import Checkpoint
    from subnet_ft.masks import SubnetMask

TOLERANCES: tuple[float, ...] = (0.0, 1e-6, 1e-5, 1e-4)

# Elements compared at a time: a few temporary tensors of 16 MiB, whatever the size of a weight.
_CHUNK = 4_194_304
_NAMED_OFFENDERS = 5


@dataclass(frozen=True)
class RunWeights:
    """One run to compare: its checkpoint and the mask it trained under (`None` for a run that trained everything)."""

    checkpoint: Checkpoint
    mask: SubnetMask | None = None


@dataclass(frozen=True)
class WeightComparison:
    """How one run's weights relate to the base model's and the full run's; tolerances are keys such as "1e-05"."""

    off_mask_changed: int | None
    """Weights outside the run's mask whose stored bits differ from the base model's; `None` without a mask."""
    off_mask_tensors: list[str]
    """The first tensors in which that happened."""
    mask_changed_share: float | None
    """Share of the run's mask whose bits differ from the base model's; `None` without a mask or for an empty one."""
    in_mask_identical: dict[str, float] | None
    """Share of the weights whose bits the full run changed where |run - full| <= tolerance; at 0 the bits are equal.
    `None` if it changed none."""
    identical: dict[str, float]
    """The same over all weights."""
    base_identical: dict[str, float]
    """Share of all weights where |base - full| <= tolerance: what doing nothing would reach."""
    base_in_mask_identical: dict[str, float] | None
    """The same over the weights whose bits the full run changed; 0 at tolerance 0, by construction."""
    relative_distance: float | None
    """||run - full|| / ||base - full||: 0 is the full run, 1 is the base model; `None` if the full run changed nothing
    or a norm is not finite."""
    num_parameters: int
    """Weights compared, tied ones once."""
    num_in_mask: int
    """Weights whose bits the full run changed."""


@dataclass
class _Closeness:
    """Counts of one model against the full run."""

    overall: list[int] = field(default_factory=lambda: [0] * len(TOLERANCES))
    in_mask: list[int] = field(default_factory=lambda: [0] * len(TOLERANCES))
    squared_distance: float = 0.0

    def add(self, values: torch.Tensor, full: torch.Tensor, in_mask: torch.Tensor) -> None:
        """Add one chunk; all arguments are flat and of one length, `in_mask` is bool."""
        differs = bits_view(values) != bits_view(full)
        count, inside = values.numel() - int(differs.sum()), int((in_mask & ~differs).sum())
        # Everything below runs only on weights whose bits differ: a small share of a subnetwork's.
        delta = (values[differs].float() - full[differs].float()).abs()
        delta_in_mask = in_mask[differs]
        self.squared_distance += float(delta.double().square().sum())
        for index, tolerance in enumerate(TOLERANCES):
            close = delta <= tolerance if tolerance > 0 else torch.zeros_like(delta_in_mask)
            self.overall[index] += count + int(close.sum())
            self.in_mask[index] += inside + int((close & delta_in_mask).sum())


@dataclass
class _Movement:
    """Counts of one run against the base model."""

    off_mask: int = 0
    offenders: list[str] = field(default_factory=list)
    in_mask: int = 0
    mask_size: int = 0

    def add(self, name: str, values: torch.Tensor, base: torch.Tensor, mask: torch.Tensor) -> None:
        changed = bits_view(values) != bits_view(base)
        inside = int((changed & mask).sum())
        outside = int(changed.sum()) - inside
        self.in_mask += inside
        self.mask_size += int(mask.sum())
        self.off_mask += outside
        if outside and name not in self.offenders and len(self.offenders) < _NAMED_OFFENDERS:
            self.offenders.append(name)


def compare_weights(
    base: Checkpoint, full: Checkpoint, runs: Mapping[str, RunWeights], *, dtype: str | None = None
) -> dict[str, WeightComparison]:
    """Compare every run with the base model and the full run in one pass over all checkpoints.

    Subtraction is in fp32 and norms accumulate in fp64. Besides one tensor of each checkpoint, memory holds a few
    chunks of four million elements.

    Args:
        base: The base checkpoint.
        full: The full run's checkpoint.
        runs: Name to checkpoint and mask.
        dtype: Cast every weight to `bfloat16`, `float16` or `float32` first; "changed" then means: in that dtype.

    Raises:
        CheckpointMismatchError: Names or shapes differ between checkpoints, or dtypes do and `dtype` is `None`.
        MaskMismatchError: A mask lacks a tensor or has another shape.
        ValueError: `dtype` is none of the three.
    """
    check_dtype(dtype)
    for checkpoint in (full, *(run.checkpoint for run in runs.values())):
        check_specs(base, checkpoint, any_dtype=dtype is not None)

    def cast(values: torch.Tensor) -> torch.Tensor:
        return values if dtype is None else values.to(getattr(torch, dtype))

    names = list(base.specs)
    streams = [checkpoint.tensors(names) for checkpoint in (base, full, *(run.checkpoint for run in runs.values()))]

    base_closeness = _Closeness()
    closeness = {name: _Closeness() for name in runs}
    movement = {name: _Movement() for name, run in runs.items() if run.mask is not None}
    num_parameters = num_in_mask = 0

    for items in zip(*streams, strict=True):
        name = items[0][0]
        base_values, full_values, *run_values = [tensor.detach().reshape(-1) for _, tensor in items]
        shape = tuple(base.specs[name].shape)
        masks = {run: _dense(entry.mask, name, shape, run) for run, entry in runs.items() if entry.mask is not None}
        for start in range(0, base_values.numel(), _CHUNK):
            part = slice(start, start + _CHUNK)
            base_part, full_part = cast(base_values[part]), cast(full_values[part])
            in_mask = bits_view(base_part) != bits_view(full_part)
            num_parameters += base_part.numel()
            num_in_mask += int(in_mask.sum())
            base_closeness.add(base_part, full_part, in_mask)
            for run, values in zip(runs, run_values, strict=True):
                run_part = cast(values[part])
                closeness[run].add(run_part, full_part, in_mask)
                if run in masks:
                    movement[run].add(name, run_part, base_part, masks[run][part])

    def in_mask_shares(counts: _Closeness) -> dict[str, float] | None:
        return _shares(counts.in_mask, num_in_mask) if num_in_mask else None

    comparisons = {}
    for run in runs:
        moved = movement.get(run)
        comparisons[run] = WeightComparison(
            off_mask_changed=moved.off_mask if moved else None,
            off_mask_tensors=moved.offenders if moved else [],
            mask_changed_share=moved.in_mask / moved.mask_size if moved and moved.mask_size else None,
            in_mask_identical=in_mask_shares(closeness[run]),
            identical=_shares(closeness[run].overall, num_parameters),
            base_identical=_shares(base_closeness.overall, num_parameters),
            base_in_mask_identical=in_mask_shares(base_closeness),
            relative_distance=_ratio(closeness[run].squared_distance, base_closeness.squared_distance),
            num_parameters=num_parameters,
            num_in_mask=num_in_mask,
        )
    return comparisons


def check_dtype(dtype: str | None) -> None:
    """Raise ValueError unless weights can be cast to `dtype` before a comparison."""
    if dtype is not None and dtype not in COMPARE_DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(COMPARE_DTYPES)}, got {dtype!r}.")


def check_specs(base: Checkpoint, other: Checkpoint, *, any_dtype: bool) -> None:
    """Raise unless both checkpoints hold the same tensors with the same shapes and, if they must, dtypes."""
    problems = [f"`{name}` is missing" for name in base.specs if name not in other.specs]
    problems += [f"`{name}` is not in the base" for name in other.specs if name not in base.specs]
    recast: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name, spec in base.specs.items():
        found = other.specs.get(name)
        if found is None:
            continue
        if tuple(found.shape) != tuple(spec.shape):
            problems.append(f"`{name}` has shape {tuple(found.shape)}, the base has {tuple(spec.shape)}")
        elif found.dtype != spec.dtype and not any_dtype:
            recast[name] = (found.dtype, spec.dtype)
    advice = "Compare checkpoints of one model, saved whole."
    if recast and not problems:
        wanted = narrowest_dtype(dtype for pair in recast.values() for dtype in pair)
        advice = f"Compare them after a cast with dtype='{wanted}', or save all of them in one dtype."
    problems += [f"`{name}` is stored in {ours}, the base in {theirs}" for name, (ours, theirs) in recast.items()]
    if problems:
        raise CheckpointMismatchError(
            f"Checkpoint `{other.name}` cannot be compared with base `{base.name}`: "
            f"{listing(problems, limit=_NAMED_OFFENDERS)}. {advice}"
        )


def _dense(mask: SubnetMask, name: str, shape: tuple[int, ...], owner: str) -> torch.Tensor:
    if name not in mask:
        raise MaskMismatchError(f"The mask of {owner} lacks `{name}`. Use a mask extracted from this base model.")
    dense = mask[name]
    if tuple(dense.shape) != shape:
        raise MaskMismatchError(
            f"The mask of {owner} has shape {tuple(dense.shape)} for `{name}`, the checkpoint has {shape}. "
            "Use a mask extracted from this base model."
        )
    return dense.reshape(-1)


def _shares(counts: list[int], total: int) -> dict[str, float]:
    return {f"{tolerance:g}": count / total for tolerance, count in zip(TOLERANCES, counts, strict=True)}


def _ratio(squared: float, squared_base: float) -> float | None:
    if squared_base == 0 or not (math.isfinite(squared) and math.isfinite(squared_base)):
        return None
    return math.sqrt(squared / squared_base)
