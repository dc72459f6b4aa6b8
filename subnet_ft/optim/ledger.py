"""Where the memory of training goes, by component."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from subnet_ft.optim.masked_adamw import MaskedAdamW


def memory_ledger(model: torch.nn.Module, optimizer: MaskedAdamW) -> dict[str, int]:
    """Count the bytes that live from one step to the next, from the tensors themselves.

    Args:
        model: The model in training.
        optimizer: Its optimizer, after at least one step.

    Returns:
        Bytes of `weights`, `gradients` (dense, of every tensor with a trainable weight, as autograd allocates them),
        `moments`, `masters` and `mask`.
    """
    ledger = {"weights": 0, "gradients": 0, "moments": 0, "masters": 0, "mask": 0}
    for parameter in model.parameters():
        ledger["weights"] += parameter.nbytes
        if parameter.requires_grad:
            ledger["gradients"] += parameter.nbytes
    for values in optimizer.state.values():
        ledger["moments"] += values["exp_avg"].nbytes + values["exp_avg_sq"].nbytes
        ledger["masters"] += values["master"].nbytes if "master" in values else 0
    ledger["mask"] = sum(tensor.bits.nbytes for tensor in optimizer.mask.tensors.values())
    return ledger
