"""Tiny models with an adapter of every kind, and masks of a part of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from helpers import random_bits

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.masks import SubnetMask, canonical_name
from subnet_ft.methods.adapters import adapter_parameters, attach
from subnet_ft.recipe.methods import METHODS
from subnet_ft.training.adapters import left_as_built

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {},
    "ia3": {},
    "shira": {"r": 4},
    "adapters": {},
    "prompt_tuning": {},
    "prefix_tuning": {},
    "adaption_prompt": {},
}
"""A method that trains an adapter, and its config on a tiny model."""


def adapted(
    kind: str = "lora", *, dtype: torch.dtype = torch.float32, distance: float = 0.0, sharpness: float = 1.0
) -> Any:
    """Add an adapter to the tiny llama; the same arguments give the same bits.

    Args:
        kind: A key of `KINDS`.
        dtype: Of the base.
        distance: Scale of what is added to every weight of the adapter, so that it computes something else than its
            base.
        sharpness: Factor of every logit. At 1 the frozen head of a tiny model gives no token a probability above 0.13.
    """
    base: Any = tiny_model("llama", dtype=dtype)
    base.model.norm.weight.data.mul_(sharpness)
    model: Any = attach(base, tiny_tokenizer(), kind, KINDS[kind], seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(distance * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def half_of_the_adapter(model: Any) -> SubnetMask:
    """Mask half of every tensor of the adapter, nothing of the last one and nothing of the base."""
    trained = list(adapter_parameters(model))[:-1]
    return SubnetMask.from_dense(
        {
            name: random_bits(p.numel(), 0.5 if name in trained else 0.0, seed).view(p.shape)
            for seed, (name, p) in enumerate((canonical_name(key), p) for key, p in model.named_parameters())
        }
    )


def kept(model: Any) -> AbstractContextManager[None]:
    """Build a trainer inside as a recipe's is built, whatever it does to an adapter."""
    return left_as_built(model, METHODS["lora"], "Trainer")
