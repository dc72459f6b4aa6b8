"""What the tests of the Triton kernels share: where they run, and inputs with poison wherever nothing may be read."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from helpers import DENSITIES, SIZES, random_bits

from subnet_kernels import AdamWUpdate, BitMask, SGDUpdate, pack_bits, rounding_key, split_master

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def cases(*kinds: Any) -> list[Any]:
    """Return (size, density, kind) for all sizes, densities and kinds, and one size and density between them.

    The interpreter takes seconds for a large tensor, so only the first kind gets all of them in the fast tests.
    """
    found = []
    for kind in kinds:
        sizes = [(size, density) for size in SIZES for density in DENSITIES]
        for size, density in [*sizes, (5000, 0.6)]:
            is_slow = IS_INTERPRETED and size > 5000 and density and kind is not kinds[0]
            found.append(pytest.param(size, density, kind, marks=[pytest.mark.slow] if is_slow else []))
    return found


# Kinds of weights and masters that an update may have.
WEIGHTS = {
    "fp32": (torch.float32, None),
    "bf16, masters": (torch.bfloat16, torch.float32),
    "bf16, remainders": (torch.bfloat16, torch.int16),
    "bf16, stochastic": (torch.bfloat16, None),
    "fp16, masters": (torch.float16, torch.float32),
}

Update = AdamWUpdate | SGDUpdate


def bit_mask(chosen: torch.Tensor) -> BitMask:
    """Index (N,) bool for the device of these tests."""
    return BitMask.from_bits(pack_bits(chosen), chosen.numel(), DEVICE)


def values(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Draw (size,) normal values on the CPU."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(dense: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Fill everything off the mask with NaN; a NaN of 16 bits gets an odd payload, which must survive."""
    dense = dense.masked_fill(~chosen, float("nan"))
    if dense.element_size() == 2:
        dense.view(torch.int16)[~chosen] |= 0x15
    return dense


def adamw_update(
    size: int, density: float, weights: str, grad: torch.dtype | None, seed: int = 0, **options: object
) -> AdamWUpdate:
    """Draw one tensor's update on the CPU; its gradient is compact where `grad` is `None`."""
    chosen = random_bits(size, density, seed)
    dtype, master_dtype = WEIGHTS[weights]
    mask = BitMask.from_bits(pack_bits(chosen), size)
    param = poisoned(values(size, dtype, seed + 1), chosen)
    master = values(mask.count, torch.float32, seed + 2) if master_dtype == torch.float32 else None
    if master_dtype == torch.int16:
        param[chosen], master = split_master(values(mask.count, torch.float32, seed + 2))
    compact = values(mask.count, torch.float32, seed + 3)
    update = AdamWUpdate(
        param=param,
        mask=mask,
        grad=compact if grad is None else poisoned(values(size, grad, seed + 3), chosen),
        exp_avg=values(mask.count, torch.float32, seed + 4),
        exp_avg_sq=values(mask.count, torch.float32, seed + 5).square(),
        master=master,
        lr=1e-2,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
        step=7,
        rounding_key=rounding_key(seed, 1, 7),
    )
    return dataclasses.replace(update, **options)  # type: ignore[arg-type]


def sgd_update(
    size: int, density: float, weights: str, grad: torch.dtype | None, seed: int = 0, *, momentum: float, nesterov: bool
) -> SGDUpdate:
    """Draw one tensor's update by SGD on the CPU."""
    drawn = adamw_update(size, density, weights, grad, seed)
    return SGDUpdate(
        param=drawn.param,
        mask=drawn.mask,
        grad=drawn.grad,
        momentum_buffer=drawn.exp_avg if momentum else None,
        master=drawn.master,
        lr=1e-2,
        momentum=momentum,
        weight_decay=0.1,
        nesterov=nesterov,
        rounding_key=drawn.rounding_key,
    )


def on_device(update: Update) -> Update:
    """Copy an update to the device of these tests; nothing is shared with the original."""
    fields = {field.name: getattr(update, field.name) for field in dataclasses.fields(update)}
    moved = {name: field.clone().to(DEVICE) for name, field in fields.items() if isinstance(field, torch.Tensor)}
    mask = BitMask.from_bits(update.mask.bits, update.mask.num_elements, DEVICE)
    return dataclasses.replace(update, mask=mask, **moved)


def changed_tensors(update: Update) -> dict[str, torch.Tensor]:
    """Return what an update changes, on the CPU."""
    names = ("param", "exp_avg", "exp_avg_sq", "momentum_buffer", "master")
    found = {name: getattr(update, name, None) for name in names}
    return {name: tensor.cpu() for name, tensor in found.items() if tensor is not None}
