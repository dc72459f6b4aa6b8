"""Where the memory of training goes, by component."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.optim.shards import local
from subnet_kernels import BitMask

if TYPE_CHECKING:
    from subnet_ft.optim.base import MaskedBase


def memory_ledger(model: torch.nn.Module, optimizer: MaskedBase) -> dict[str, int]:
    """Count the bytes that live in this process from one step to the next, from the tensors themselves.

    Args:
        model: The model in training.
        optimizer: Its optimizer, after at least one step.

    Returns:
        Bytes of `weights`, `gradients` (the compact buffers; without compaction the dense gradients of every tensor
        with a trainable weight, as autograd allocates them), `moments`, `masters` and `mask` (bits, and where every
        tile starts).
    """
    ledger = {"weights": sum(local(parameter).nbytes for parameter in model.parameters()), **optimizer.memory()}
    if not optimizer.compact_grads:
        ledger["gradients"] += sum(local(p).nbytes for p in model.parameters() if p.requires_grad)
    return ledger


def state_nbytes(state: Mapping[Any, Mapping[str, Any]]) -> dict[str, int]:
    """Count the bytes of an optimizer's `moments` and `masters`."""
    entries = [item for values in state.values() for item in values.items() if isinstance(item[1], torch.Tensor)]
    return {
        "moments": sum(value.nbytes for key, value in entries if key not in ("step", "master")),
        "masters": sum(value.nbytes for key, value in entries if key == "master"),
    }


def cache_nbytes(cache: Mapping[Any, Any]) -> int:
    """Count the bytes of the tensors and arrays anywhere in a cache; the masks it names are counted elsewhere."""
    total = 0
    for value in cache.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, dict):
                total += cache_nbytes(item)
            elif not isinstance(item, BitMask):
                total += getattr(item, "nbytes", 0)
    return total
