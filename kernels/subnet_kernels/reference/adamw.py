"""AdamW on the masked elements of one tensor."""

from __future__ import annotations

import torch

from subnet_kernels.reference.bitmap import gather, scatter
from subnet_kernels.reference.rounding import join_master, round_to_bfloat16, split_master

_CHUNK = 1 << 18  # the temporaries of a step stay in cache and never grow with the tensor


def masked_adamw(
    param: torch.Tensor,
    bits: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    master: torch.Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: torch.Tensor | None,
) -> None:
    """Update the masked elements of (N,) `param` from compact (K,) state, in place."""
    beta1, beta2 = betas
    step_size = lr / (1.0 - beta1**step)
    bias_correction2_sqrt = (1.0 - beta2**step) ** 0.5
    values = gather(param, bits, grad.numel(), dtype=param.dtype)
    for start in range(0, grad.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        weight = _read(values[part], None if master is None else master[part])
        scaled = grad[part] if grad_scale is None else grad[part] * grad_scale
        # The order of operations is that of torch.optim.AdamW.
        weight.mul_(1.0 - lr * weight_decay)
        exp_avg[part].lerp_(scaled, 1.0 - beta1)
        exp_avg_sq[part].mul_(beta2).addcmul_(scaled, scaled, value=1.0 - beta2)
        denominator = (exp_avg_sq[part].sqrt() / bias_correction2_sqrt).add_(eps)
        weight.addcdiv_(exp_avg[part], denominator, value=-step_size)
        _write(weight, values[part], None if master is None else master[part])
    scatter(param, bits, values)


def _read(values: torch.Tensor, master: torch.Tensor | None) -> torch.Tensor:
    """Return the float32 weights of a chunk; the master or a float32 chunk itself, so that updates reach it."""
    if master is None:
        return values
    return join_master(values, master) if master.dtype == torch.int16 else master


def _write(weight: torch.Tensor, values: torch.Tensor, master: torch.Tensor | None) -> None:
    """Round the float32 weights of a chunk into `values`, and keep what rounding drops where that is the master."""
    if master is None:
        return
    if master.dtype == torch.int16:
        rounded, remainder = split_master(weight)
        values.copy_(rounded)
        master.copy_(remainder)
    else:
        values.copy_(round_to_bfloat16(weight) if values.dtype == torch.bfloat16 else weight)
