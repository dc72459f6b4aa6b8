"""Seeing every weight before and after its update, at the memory of a slice of one tensor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

import subnet_kernels
from subnet_kernels import AdamWUpdate, BitMask, SGDUpdate

SLICE = 1 << 20
"""Elements of a tensor that are updated at a time while a step is watched; whole tiles."""

Update = TypeVar("Update", AdamWUpdate, SGDUpdate)


@dataclass
class StepWatch:
    """Counts over a watched step, of the weights that its mask trains and that got a gradient.

    The float32 value of a weight is its master's, or its own where it is float32.
    """

    num_updates: int = 0
    """Weights whose float32 value moved."""
    num_changed: int = 0
    """Weights whose stored bits changed."""
    num_kept_back: int = 0
    """Weights whose float32 value moved and whose stored bits did not change."""
    num_rounded_away: int = 0
    """Weights whose float32 value moved and whose stored bits would not change if the difference of the two float32
    values were added to the stored weight, and the sum rounded as masters are (`round_to_weights`)."""
    peak_bytes: int = 0
    """Most bytes of copies held at a time."""
    seconds: float = 0.0
    """Wall time of looking, without the updates."""

    def slices(self, update: Update) -> Iterator[Update]:
        """Yield the parts of an update one after another; each must be done before the next is asked for.

        The parts together are the whole: an update treats every weight by itself.

        Raises:
            ValueError: Weights are rounded stochastically: by random bits that depend on the place in the whole tensor.
        """
        if update.rounding_key is not None:
            raise ValueError("a weight that is rounded stochastically has no float32 value to watch")
        for part in _slices(update):
            start = time.perf_counter()
            stored = subnet_kernels.gather(part.param, part.mask, dtype=part.param.dtype)
            before = _float32(part, stored)
            before = before.clone() if before is part.master else before
            self.seconds += time.perf_counter() - start
            yield part
            start = time.perf_counter()
            self._count(part, stored, before)
            self.seconds += time.perf_counter() - start

    def _count(self, part: AdamWUpdate | SGDUpdate, stored: torch.Tensor, before: torch.Tensor) -> None:
        now = subnet_kernels.gather(part.param, part.mask, dtype=part.param.dtype)
        after = _float32(part, now)
        moved, num_moved = subnet_kernels.changed_bits(before, after)
        changed, num_changed = subnet_kernels.changed_bits(stored, now)
        added = (after - before).add_(stored)
        rounded = subnet_kernels.round_to_weights(added, stored.dtype)
        would_change, _ = subnet_kernels.changed_bits(stored, rounded)
        self.num_updates += num_moved
        self.num_changed += num_changed
        self.num_kept_back += subnet_kernels.count_bits(moved & ~changed)
        self.num_rounded_away += subnet_kernels.count_bits(moved & ~would_change)
        held = (stored, before, now, after, added, rounded, moved, changed, would_change)
        self.peak_bytes = max(self.peak_bytes, sum(tensor.nbytes for tensor in held))


def _float32(part: AdamWUpdate | SGDUpdate, stored: torch.Tensor) -> torch.Tensor:
    """Return the (K,) float32 values of a part whose stored (K,) weights are given; they may be the masters."""
    if part.master is None:
        return stored
    return part.master if part.master.is_floating_point() else subnet_kernels.join_master(stored, part.master)


def _slices(update: Update) -> Iterator[Update]:
    mask, first = update.mask, 0
    tensors = {field.name: getattr(update, field.name) for field in fields(update)}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    for start in range(0, mask.num_elements, SLICE):
        dense = slice(start, min(start + SLICE, mask.num_elements))
        part = BitMask.from_bits(mask.bits[start // 8 : (dense.stop + 7) // 8], dense.stop - start)
        compact = slice(first, first + part.count)
        first = compact.stop
        if not part.count:
            continue
        cut: dict[str, Any] = {
            name: value[dense if value.numel() == mask.num_elements else compact] for name, value in tensors.items()
        }
        yield replace(update, mask=part, **cut)
