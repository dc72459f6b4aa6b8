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
    count = grad.numel()
    if master is None:
        weight = gather(param, bits, count, dtype=torch.float32)
        _adamw(weight, grad, exp_avg, exp_avg_sq, lr, betas, eps, weight_decay, step, grad_scale)
        scatter(param, bits, weight)
    elif master.dtype == torch.int16:
        weight = join_master(gather(param, bits, count, dtype=torch.bfloat16), master)
        _adamw(weight, grad, exp_avg, exp_avg_sq, lr, betas, eps, weight_decay, step, grad_scale)
        rounded, remainder = split_master(weight)
        master.copy_(remainder)
        scatter(param, bits, rounded)
    else:
        _adamw(master, grad, exp_avg, exp_avg_sq, lr, betas, eps, weight_decay, step, grad_scale)
        scatter(param, bits, round_to_bfloat16(master) if param.dtype == torch.bfloat16 else master.to(param.dtype))


def _adamw(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: torch.Tensor | None,
) -> None:
    """Apply one AdamW update to (K,) float32 `weight`, in the order of operations of `torch.optim.AdamW`."""
    beta1, beta2 = betas
    step_size = lr / (1.0 - beta1**step)
    bias_correction2_sqrt = (1.0 - beta2**step) ** 0.5
    for start in range(0, weight.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        scaled = grad[part] if grad_scale is None else grad[part] * grad_scale
        weight[part].mul_(1.0 - lr * weight_decay)
        exp_avg[part].lerp_(scaled, 1.0 - beta1)
        exp_avg_sq[part].mul_(beta2).addcmul_(scaled, scaled, value=1.0 - beta2)
        denominator = (exp_avg_sq[part].sqrt() / bias_correction2_sqrt).add_(eps)
        weight[part].addcdiv_(exp_avg[part], denominator, value=-step_size)
