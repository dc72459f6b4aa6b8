"""Optimizer steps on the masked elements of many tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from subnet_kernels.dispatch import choose
from subnet_kernels.ops.copies import check_mask
from subnet_kernels.updates import AdamWUpdate, SGDUpdate

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def masked_adamw(
    updates: Sequence[AdamWUpdate],
    *,
    grad_scale: torch.Tensor | None = None,
    cache: dict[Any, Any] | None = None,
) -> None:
    """Update the subnetworks of many tensors in place, in a few launches; every other element keeps its bits.

    Every operation rounds to float32 by itself, so that all backends give the same bits.

    Args:
        updates: One entry per tensor, all on one device; each says which of its tensors are changed.
        grad_scale: () float32 on the device, multiplied into every gradient (the clip coefficient), or `None`. In.
        cache: Pass the same dict at every step: an implementation may keep there what depends only on the masks.

    Example:
        N = 4, mask 0b1010: elements 0 and 2 of `param` keep their bits. From zero moments with lr 0.1, betas
        (0.9, 0.999), no decay, step 1: an element 1.0 with gradient 0.5 becomes 0.9.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), Algorithm 2.
    """
    for update in updates:
        _check(update, (update.exp_avg, update.exp_avg_sq))
    _run("masked_adamw", updates, grad_scale, cache)


def masked_sgd(
    updates: Sequence[SGDUpdate],
    *,
    grad_scale: torch.Tensor | None = None,
    cache: dict[Any, Any] | None = None,
) -> None:
    """Update the subnetworks of many tensors by SGD, in place; every other element keeps its bits.

    Args:
        updates: One entry per tensor, all on one device.
        grad_scale: () float32 on the device, multiplied into every gradient, or `None`. In.
        cache: As in `masked_adamw`.

    Example:
        N = 4, mask 0b1010, lr 0.1: elements 1 and 3 with value 1.0 and gradient 0.5 become 0.95.

    Source: torch.optim.SGD without dampening.
    """
    for update in updates:
        if (update.momentum_buffer is None) != (update.momentum == 0.0):
            raise ValueError(
                f"`momentum` {update.momentum} with{'out' if update.momentum_buffer is None else ''} a buffer"
            )
        _check(update, (update.momentum_buffer,))
    _run("masked_sgd", updates, grad_scale, cache)


def _run(
    op: str,
    updates: Sequence[AdamWUpdate] | Sequence[SGDUpdate],
    grad_scale: torch.Tensor | None,
    cache: dict[Any, Any] | None,
) -> None:
    if not updates:
        return
    device = updates[0].param.device
    if any(update.param.device != device for update in updates):
        raise ValueError("all tensors of one call must lie on one device")
    choice = choose(op, device)
    options: dict[str, Any] = {"grad_scale": grad_scale}
    if choice.backend != "reference":
        options["cache"] = {} if cache is None else cache
    function: Callable[..., None] = choice.function
    function(updates, **options)


def _check(update: AdamWUpdate | SGDUpdate, state: tuple[torch.Tensor | None, ...]) -> None:
    """Raise ValueError unless every tensor of an update fits its mask; hundreds of updates make one step."""
    param, mask, grad, master = update.param, update.mask, update.grad, update.master
    if grad.device != param.device or not grad.is_contiguous():
        raise ValueError(f"`grad` must be contiguous and on {param.device}, got {grad.device}")
    check_mask(mask, param.numel(), param.device)
    if param.dtype not in _FLOATS or param.dim() != 1 or not param.is_contiguous():
        raise ValueError(
            f"`param` must be flat and contiguous, bfloat16, float16 or float32, got {param.dtype} of shape "
            f"{tuple(param.shape)}: an update of a copy would be lost"
        )
    if grad.dim() != 1 or not (
        (grad.dtype == torch.float32 and grad.numel() == mask.count)
        or (grad.dtype in _FLOATS and grad.numel() == mask.num_elements)
    ):
        raise ValueError(
            f"`grad` must be torch.float32 of shape ({mask.count},) or floating of shape {tuple(param.shape)}, got "
            f"{grad.dtype} {tuple(grad.shape)}"
        )
    for tensor in state:
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"state must be torch.float32, got {tensor.dtype}")
    for tensor in (*state, master):
        if tensor is None:
            continue
        if tensor.dim() != 1 or tensor.numel() != mask.count:
            raise ValueError(f"state has shape {tuple(tensor.shape)}, the mask has {mask.count} set bits")
        if not tensor.is_contiguous() or tensor.device != param.device:
            raise ValueError(f"state must be contiguous and on {param.device}, got {tensor.device}")
    _check_master(param, master, update.rounding_key)


def _check_master(param: torch.Tensor, master: torch.Tensor | None, rounding_key: int | None) -> None:
    if master is None:
        if param.dtype == torch.float16:
            raise ValueError("a float16 `param` needs float32 masters")
        if param.dtype == torch.bfloat16 and rounding_key is None:
            raise ValueError("a bfloat16 `param` without masters is rounded stochastically and needs `rounding_key`")
    elif master.dtype == torch.int16:
        if param.dtype != torch.bfloat16:
            raise ValueError(f"remainders go with a bfloat16 `param`, got {param.dtype}")
    elif master.dtype != torch.float32 or param.dtype == torch.float32:
        raise ValueError(
            f"`master` must be float32 or int16 beside a bfloat16 `param`, float32 beside float16 and absent beside "
            f"float32, got {master.dtype} beside {param.dtype}"
        )
