"""What the tests of the optimizer steps share: kinds of weights, updates with poison off the mask, guarded memory."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
from typing import Any

import numpy as np
import torch
from helpers import random_bits, same_bits

from subnet_kernels import AdamWUpdate, BitMask, SGDUpdate, pack_bits, round_to_weights, rounding_key, split_master

Update = AdamWUpdate | SGDUpdate

WEIGHTS = {
    "fp32": (torch.float32, None),
    "bf16, masters": (torch.bfloat16, torch.float32),
    "bf16, remainders": (torch.bfloat16, torch.int16),
    "bf16, stochastic": (torch.bfloat16, None),
    "fp16, masters": (torch.float16, torch.float32),
}
"""Dtypes of the weights and of their masters."""

GRADS = (None, torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of a dense gradient; `None` is a compact one."""

CLUSTERED = "a dense run in a sparse mask"
"""A density for `chosen` of 300,000: the largest block of the compiled form is full, although the tensor is sparse."""

KEY = rounding_key(seed=1, stream=2, step=3)


def chosen(size: int, density: float | str) -> torch.Tensor:
    """Draw (size,) bool, the same every time."""
    if density != CLUSTERED:
        return random_bits(size, float(density))
    bits = random_bits(size, 0.002)
    bits[60_000:130_000] = True
    return bits


def bit_mask(bits: torch.Tensor) -> BitMask:
    """Index (N,) bool."""
    return BitMask.from_bits(pack_bits(bits), bits.numel())


def values(size: int, seed: int) -> torch.Tensor:
    """Draw (size,) normal float32 values."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def weights(bits: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a parameter with NaN off the mask, and its masters, of which it is the rounding."""
    dtype, master_dtype = WEIGHTS[kind]
    exact = values(bits.numel(), 1)
    param = round_to_weights(exact, dtype).masked_fill(~bits, float("nan"))
    if dtype != torch.float32:
        param.view(torch.int16)[~bits] |= 0x15  # a payload that must survive
    if master_dtype == torch.int16:
        return param, split_master(exact[bits])[1]
    return param, None if master_dtype is None else exact[bits]


def gradient(bits: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a compact gradient, or a dense one of `dtype` with NaN off the mask."""
    exact = values(bits.numel(), 2)
    return exact[bits] if dtype is None else exact.to(dtype).masked_fill(~bits, float("nan"))


def adamw_update(bits: torch.Tensor, kind: str, grad: torch.dtype | None, **fields: Any) -> AdamWUpdate:
    """Return an update in the middle of a run."""
    count = int(bits.sum())
    param, master = weights(bits, kind)
    given = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": 3, "rounding_key": KEY}
    return AdamWUpdate(
        param, bit_mask(bits), gradient(bits, grad), values(count, 3), values(count, 4).square(), master,
        **(given | fields),
    )  # fmt: skip


def sgd_update(bits: torch.Tensor, kind: str, grad: torch.dtype | None, **fields: Any) -> SGDUpdate:
    """Return an update in the middle of a run, with momentum unless `fields` says 0."""
    param, master = weights(bits, kind)
    given = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "rounding_key": KEY} | fields
    buffer = values(int(bits.sum()), 3) if given["momentum"] else None
    return SGDUpdate(param, bit_mask(bits), gradient(bits, grad), buffer, master, **given)


def copied(update: Any, **fields: Any) -> Any:
    """Copy an update's tensors, so that a step can change them."""
    tensors = {name: tensor.clone() for name, tensor in tensors_of(update).items()}
    return dataclasses.replace(update, **(tensors | fields))


def tensors_of(update: Update) -> dict[str, torch.Tensor]:
    """Return the tensors of an update by their names."""
    found = {field.name: getattr(update, field.name) for field in dataclasses.fields(update)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def assert_same(found: Update, expected: Update, label: object = "") -> None:
    """Compare all tensors of two updates bit for bit."""
    wanted = tensors_of(expected)
    for name, tensor in tensors_of(found).items():
        assert same_bits(tensor, wanted[name]), (name, label)


def at_page_end(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to where the next byte behind it cannot be touched without ending the process."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    view = np.frombuffer(memory, dtype=np.uint8, count=tensor.nbytes, offset=size - tensor.nbytes)
    copy = torch.from_numpy(view).view(tensor.dtype)
    copy.copy_(tensor)
    return copy
