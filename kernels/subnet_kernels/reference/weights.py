"""The float32 weights that an update works on, chunk by chunk, and their way back into the parameter."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from subnet_kernels.reference.bitmap import indices
from subnet_kernels.reference.copies import gather, scatter
from subnet_kernels.reference.rounding import join_master, round_stochastically, round_to_weights, split_master
from subnet_kernels.updates import AdamWUpdate, SGDUpdate

_CHUNK = 1 << 18  # the temporaries of a step stay in cache and never grow with the tensor


def updated_in_chunks(
    update: AdamWUpdate | SGDUpdate, grad_scale: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield chunks of the compact layout, each with its float32 weights, to be changed in place, and scaled gradient.

    What the caller leaves in the weights is rounded into the parameter, by the rule of its master.
    """
    param, mask, master = update.param, update.mask, update.master
    is_compact = update.grad.dtype == torch.float32 and update.grad.numel() == mask.count
    grad = update.grad if is_compact else gather(update.grad, mask, dtype=torch.float32)
    values = gather(param, mask, dtype=param.dtype)
    is_stochastic = master is None and param.dtype != torch.float32
    positions = indices(mask) if is_stochastic else None
    for start in range(0, mask.count, _CHUNK):
        part = slice(start, start + _CHUNK)
        if master is None:
            weight = values[part].float()
        else:
            weight = join_master(values[part], master[part]) if master.dtype == torch.int16 else master[part]
        yield part, weight, grad[part] if grad_scale is None else grad[part] * grad_scale
        if positions is not None:
            assert update.rounding_key is not None
            values[part] = round_stochastically(weight, positions[part], update.rounding_key)
        elif master is not None and master.dtype == torch.int16:
            values[part], master[part] = split_master(weight)
        else:
            values[part] = round_to_weights(weight, param.dtype)
    scatter(param, mask, values)
