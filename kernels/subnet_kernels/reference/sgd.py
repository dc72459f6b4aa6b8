"""SGD on the masked elements of many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from subnet_kernels.reference.weights import updated_in_chunks
from subnet_kernels.updates import SGDUpdate


def masked_sgd(updates: Sequence[SGDUpdate], *, grad_scale: torch.Tensor | None) -> None:
    """Update the masked elements of every tensor, in place; every operation rounds to float32 by itself."""
    for update in updates:
        buffer = update.momentum_buffer
        for part, weight, scaled in updated_in_chunks(update, grad_scale):
            grad = scaled + weight * update.weight_decay
            if buffer is not None:
                buffer[part].mul_(update.momentum).add_(grad)
                grad = grad + buffer[part] * update.momentum if update.nesterov else buffer[part]
            weight.sub_(grad * update.lr)
