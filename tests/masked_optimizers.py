"""What the tests of all masked optimizers share: one of each kind, and what is read off a model in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from helpers import same_bits

from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW, MaskedBase, MaskedOptimizer, MaskedSGD

Build = Callable[..., MaskedBase]


def masked_adamw(named_parameters: Any, mask: SubnetMask, **options: Any) -> MaskedBase:
    return MaskedAdamW(named_parameters, mask, **{"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": None, **options})


def masked_sgd(named_parameters: Any, mask: SubnetMask, **options: Any) -> MaskedBase:
    known = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "max_grad_norm": None}
    return MaskedSGD(named_parameters, mask, **{**known, **options})


def wrapped(optimizer_cls: type[torch.optim.Optimizer], **fixed: Any) -> Build:
    """Return what builds a `MaskedOptimizer` around a class."""

    def build(named_parameters: Any, mask: SubnetMask, **options: Any) -> MaskedBase:
        known = {"lr": 1e-2, "max_grad_norm": None, **fixed}
        return MaskedOptimizer(optimizer_cls, named_parameters, mask, **{**known, **options})

    return build


BUILDERS: dict[str, Build] = {
    "MaskedAdamW": masked_adamw,
    "MaskedSGD": masked_sgd,
    "MaskedOptimizer": wrapped(torch.optim.NAdam, weight_decay=0.1, momentum_decay=1e-2),
}
"""One of each class, with momentum and weight decay."""


class Stack(torch.nn.Module):
    """Tensors of three, two and one dimension, none of a whole number of bytes of bits; it computes nothing."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"experts": (3, 5, 7), "matrix": (11, 13), "head": (9, 5), "bias": (11,)}.items():
            value = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, torch.nn.Parameter(value))


def only(model: torch.nn.Module, trained: Mapping[str, torch.Tensor | bool]) -> SubnetMask:
    """Mask of some tensors: bool tensors, or True for the whole; nothing of the others."""
    dense = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for name, chosen in trained.items():
        dense[name] = dense[name] | chosen
    return SubnetMask.from_dense(dense)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the weights by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def state_of(optimizer: MaskedBase) -> dict[str, torch.Tensor]:
    """Return copies of the state as tensors, under the name of the tensor and of the entry."""
    return {
        f"{name}/{key}": torch.as_tensor(value).clone()
        for name, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
        if not isinstance(value, str)
    }


def differing(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names under which two dicts do not hold the same bits."""
    return [name for name in {**a, **b} if name not in a or name not in b or not same_bits(a[name], b[name])]
