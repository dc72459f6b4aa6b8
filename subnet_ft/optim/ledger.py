"""Where the memory of training goes, by component."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from subnet_ft.optim.base import MaskedBase


def memory_ledger(model: torch.nn.Module, optimizer: MaskedBase) -> dict[str, int]:
    """Count the bytes that live from one step to the next, from the tensors themselves.

    Args:
        model: The model in training.
        optimizer: Its optimizer, after at least one step.

    Returns:
        Bytes of `weights`, `gradients` (the compact buffers; without compaction the dense gradients of every tensor
        with a trainable weight, as autograd allocates them), `moments`, `masters` and `mask` (bits, and where every
        tile starts).
    """
    ledger = {"weights": sum(parameter.nbytes for parameter in model.parameters()), **optimizer.memory()}
    if not optimizer.compact_grads:
        ledger["gradients"] += sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return ledger
