"""Which elements of two tensors differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from subnet_kernels.reference.bitmap import count_bits, pack_bits
from subnet_kernels.reference.fingerprint import fingerprint
from subnet_kernels.reference.views import bits_view

CRITERIA = ("exact", "absolute", "relative")


@dataclass(frozen=True, eq=False)
class Comparison:
    """What one pass over two (N,) tensors finds.

    Args:
        bits: (ceil(N / 8),) uint8, the elements whose bits differ.
        count: How many those are.
        beyond: For every tolerance, how many of those differ by more.
        base_fingerprint: Of the first tensor.
        tuned_fingerprint: Of the second.
    """

    bits: torch.Tensor
    count: int
    beyond: tuple[int, ...]
    base_fingerprint: tuple[int, int]
    tuned_fingerprint: tuple[int, int]


def changed_bits(
    base: torch.Tensor, tuned: torch.Tensor, *, criterion: str, tolerance: float
) -> tuple[torch.Tensor, int]:
    """Return the packed bits of the changed elements of two (N,) tensors, and their count."""
    if criterion == "exact":
        changed = bits_view(base) != bits_view(tuned)
    else:
        base_fp32, tuned_fp32 = base.float(), tuned.float()
        threshold = base_fp32.abs().mul_(tolerance) if criterion == "relative" else tolerance
        # Equal infinities differ by NaN, and so does a NaN on one side: only the second is a change.
        unequal = (base_fp32 != tuned_fp32) & ~(base_fp32.isnan() & tuned_fp32.isnan())
        changed = unequal & ~((tuned_fp32 - base_fp32).abs() <= threshold)
    bits = pack_bits(changed)
    return bits, count_bits(bits)


def compare(base: torch.Tensor, tuned: torch.Tensor, *, offset: int, tolerances: Sequence[float]) -> Comparison:
    """Return the exactly changed bits of two (N,) tensors, their distances and both fingerprints."""
    differ = bits_view(base) != bits_view(tuned)
    bits = pack_bits(differ)
    old, new = base[differ].float(), tuned[differ].float()
    # A NaN on one side is beyond every tolerance, on both sides within every one.
    distance = (new - old).abs().nan_to_num_(nan=math.inf, posinf=math.inf)
    distance[old.isnan() & new.isnan()] = 0.0
    return Comparison(
        bits=bits,
        count=count_bits(bits),
        beyond=tuple(int((distance > tolerance).sum()) for tolerance in tolerances),
        base_fingerprint=fingerprint(base, offset=offset, outside=None),
        tuned_fingerprint=fingerprint(tuned, offset=offset, outside=None),
    )
