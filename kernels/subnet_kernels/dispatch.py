"""The one place that decides which implementation of an op runs.

Every op has a plain-torch reference that defines it, a Triton kernel for GPUs and a compiled form for the CPU.
`choose` names the one that runs on a device and why; a failure inside it is an error, never a fall back to another one.

`SUBNET_KERNELS_BACKEND=reference|cpu|triton` asks for one backend for every op; `triton` on the CPU needs Triton's
interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu", "triton")

_MODULES = {"reference": "subnet_kernels.reference", "cpu": "subnet_kernels.cpu", "triton": "subnet_kernels.gpu"}

# Ops that only the CPU ever runs, or that have nothing to gain there, have fewer than three.
_OPS: dict[str, tuple[str, ...]] = {
    "changed_bits": BACKENDS,
    "compact": BACKENDS,
    "compare": ("reference", "cpu"),
    "count_bits": ("reference", "cpu"),
    "fingerprint": BACKENDS,
    "gather": BACKENDS,
    "masked_adamw": BACKENDS,
    "masked_sgd": BACKENDS,
    "pack_bits": ("reference",),
    "patch": ("reference", "cpu"),
    "scatter": BACKENDS,
    "swap": BACKENDS,
    "unpack_bits": ("reference",),
}


@dataclass(frozen=True)
class Choice:
    """An implementation and the reason it was chosen."""

    function: Callable[..., Any]
    backend: str
    reason: str


def choose(op: str, device: torch.device, backend: str | None = None) -> Choice:
    """Return the implementation of `op` that runs on `device`.

    Args:
        op: Name of an op of this package.
        device: Where its tensors lie.
        backend: One of `BACKENDS`, instead of the fastest that is there.

    Raises:
        KeyError: `op` is not an op of this package.
        ValueError: `backend` is unknown, or cannot run `op` on `device`.
    """
    if op not in _OPS:
        raise KeyError(f"`{op}` is not an op; there are {', '.join(sorted(_OPS))}")
    wanted = backend or os.environ.get("SUBNET_KERNELS_BACKEND")
    if wanted:
        return _asked_for(op, device, wanted)
    name, reason = _fastest(device.type)
    if name not in _OPS[op]:
        name, reason = "reference", f"`{op}` has no other implementation for {device.type}"
    return Choice(_implementation(op, name), name, reason)


def backends(device: torch.device) -> dict[str, str]:
    """Return the backend that `choose` picks on `device`, for every op."""
    return {op: choose(op, device).backend for op in sorted(_OPS)}


def _asked_for(op: str, device: torch.device, name: str) -> Choice:
    if name not in BACKENDS:
        raise ValueError(f"`{name}` is not a backend; choose one of {', '.join(BACKENDS)}")
    if name not in _OPS[op]:
        name = "reference"
        return Choice(_implementation(op, name), name, f"`{op}` has no other implementation")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"the backend `cpu` cannot run on {device.type}")
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("Triton runs on the CPU only in its interpreter; set TRITON_INTERPRET=1 before the first use")
    return Choice(_implementation(op, name), name, "it was asked for")


@functools.cache
def _fastest(device_type: str) -> tuple[str, str]:
    """Return the backend for a kind of device and the reason; a missing package is said once, aloud."""
    if device_type == "cuda":  # ROCm devices carry this name, too
        if importlib.util.find_spec("triton") is not None:
            return "triton", "Triton compiles for this GPU"
        logger.warning("triton is not installed, so masked training runs plain torch on the GPU, several times slower.")
        return "reference", "triton is not installed"
    if device_type == "cpu":
        if importlib.util.find_spec("numba") is not None:
            return "cpu", "numba compiles for this CPU"
        logger.warning("numba is not installed, so masked training runs plain torch on the CPU, many times slower.")
        return "reference", "numba is not installed"
    return "reference", f"there is no faster implementation for {device_type}"


@functools.cache
def _implementation(op: str, backend: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(_MODULES[backend]), op)
    return function
