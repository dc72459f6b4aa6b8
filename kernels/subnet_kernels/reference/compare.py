"""Which elements of two tensors differ."""

from __future__ import annotations

import torch

from subnet_kernels.reference.bitmap import count_bits, pack_bits
from subnet_kernels.reference.views import bits_view

CRITERIA = ("exact", "absolute", "relative")


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
