"""AdamW on the masked elements of many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from subnet_kernels.reference.weights import updated_in_chunks
from subnet_kernels.updates import AdamWUpdate


def masked_adamw(updates: Sequence[AdamWUpdate], *, grad_scale: torch.Tensor | None) -> None:
    """Update the masked elements of every tensor from its compact state, in place.

    Every operation rounds to float32 by itself: no fused multiply-add, so that every backend gives the same bits.
    """
    for update in updates:
        exp_avg, exp_avg_sq = update.exp_avg, update.exp_avg_sq
        decay, lerp, beta2, square, step_size, correction, eps = update.scalars
        for part, weight, grad in updated_in_chunks(update, grad_scale):
            weight.mul_(decay)
            exp_avg[part].add_((grad - exp_avg[part]).mul_(lerp))
            exp_avg_sq[part].mul_(beta2).add_((grad * square).mul_(grad))
            denominator = _sqrt(exp_avg_sq[part]).mul_(correction).add_(eps)
            weight.sub_((exp_avg[part] * step_size).div_(denominator))


def _sqrt(values: torch.Tensor) -> torch.Tensor:
    """Return the correctly rounded square root; torch's own on the CPU may be one unit in the last place off."""
    if values.device.type != "cpu":
        return values.sqrt()
    return torch.from_numpy(np.sqrt(values.numpy()))
