"""A policy, a sender and a receiver of a few hundred weights, and steps that change the policy under its mask."""

from __future__ import annotations

from typing import Any

import torch
from helpers import random_mask, small_model

from subnet_ft.masks import SubnetMask
from subnet_ft.training.weight_sync import ValuesReceiver, ValuesSender

FROZEN = "2.bias"
"""A tensor of which nothing is trained."""


def mixed_model() -> torch.nn.Module:
    """Build the small model in bfloat16 with norms in float32, as some models keep them."""
    model = small_model(torch.bfloat16)
    model[1].to(torch.float32)  # type: ignore[index]
    return model


def mask_of(model: torch.nn.Module) -> SubnetMask:
    """Mask a third of every tensor, and nothing of `FROZEN`."""
    drawn = random_mask(model, 0.3)
    return SubnetMask.from_dense({name: drawn[name] & (name != FROZEN) for name in drawn.names})


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of a model's weights."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def train(model: torch.nn.Module, mask: SubnetMask, step: int = 0) -> None:
    """Change every weight on the mask."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(100 + step)
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter[mask[name]] += noise[mask[name]]


class Pair:
    """Both ends over one model, opened."""

    def __init__(self, **receiver_options: Any) -> None:
        self.model = mixed_model()
        self.mask = mask_of(self.model)
        self.sender = ValuesSender(self.model, self.mask)
        self.receiver = ValuesReceiver(tensors_of(self.model), **receiver_options)
        self.sender.acknowledge(self.receiver.open(self.sender.open()))

    def train(self, step: int = 0) -> None:
        """Change the policy."""
        train(self.model, self.mask, step)
