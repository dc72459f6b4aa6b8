"""Deltas of a model in memory, at random, and what the model is with one."""

from __future__ import annotations

import torch
from helpers import random_mask

import subnet_kernels
from subnet_ft.deltas import Delta, TensorDelta
from subnet_ft.masks import ModelRecord, SubnetMask, by_canonical_name, format_fingerprint

Weights = dict[str, torch.Tensor]


def weights_of(model: torch.nn.Module) -> Weights:
    """Return copies of the weights by canonical name."""
    return {name: p.detach().clone() for name, p in by_canonical_name(model.named_parameters()).items()}


def tuned_weights(model: torch.nn.Module, mask: SubnetMask, seed: int) -> Weights:
    """Return the weights of the model with random ones under the mask, NaN and -0.0 among them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in weights_of(model).items():
        drawn = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        drawn.view(-1)[::7] = float("nan")
        drawn.view(-1)[::5] = -0.0
        found[name] = torch.where(mask[name], drawn, weight)
    return found


def record_of(weights: Weights, name: str = "a base") -> ModelRecord:
    """Return the record of a model with these weights."""
    return ModelRecord(
        name=name,
        dtypes={key: str(weight.dtype).removeprefix("torch.") for key, weight in weights.items()},
        fingerprints={key: format_fingerprint(subnet_kernels.fingerprint(weight)) for key, weight in weights.items()},
    )


def delta_of(
    model: torch.nn.Module, *, density: float = 0.3, seed: int = 1, without: str = ""
) -> tuple[Delta, Weights]:
    """Return a delta of a model, and the weights that the model has with it.

    Args:
        model: The base.
        density: About how many of the weights change.
        seed: Of the weights that change, and of their values.
        without: A tensor of which nothing changes.
    """
    drawn = random_mask(model, density, seed)
    mask = SubnetMask.from_dense({n: drawn[n] if n != without else torch.zeros_like(drawn[n]) for n in drawn.names})
    tuned = tuned_weights(model, mask, seed)
    base = record_of(weights_of(model))
    tensors = {
        name: TensorDelta(tensor.bits, tuned[name][mask[name]], tensor.shape) for name, tensor in mask.tensors.items()
    }
    return Delta(tensors, base, record_of(tuned).fingerprints), tuned
