"""The mask decides what requires a gradient while an optimizer lives; afterwards parameters are as they were found."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from helpers import RELATIVE, random_mask, relative, small_model
from masked_optimizers import BUILDERS, masked_adamw, only

from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedBase

TRAINED, FOUND_FROZEN = ("0.weight", "2.bias"), ("1.weight", "2.bias")


def mask_of(model: torch.nn.Module) -> SubnetMask:
    """Mask a third of two tensors, one of which was frozen before."""
    drawn = random_mask(model, 0.3)
    return only(model, {name: drawn[name] for name in TRAINED})


def requires_grad(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def partly_frozen() -> torch.nn.Module:
    model = small_model(torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in FOUND_FROZEN)
    return model


def released(optimizers: list[MaskedBase]) -> None:
    """Say that it is no longer needed; somebody still holds it."""
    optimizers[0].release()


def collected(optimizers: list[MaskedBase]) -> None:
    """Drop the last reference to it."""
    optimizers.clear()
    gc.collect()


WAYS = [released, collected]


@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("ends", WAYS)
@pytest.mark.parametrize("kind", BUILDERS)
def test_an_optimizer_that_ends_gives_requires_grad_back(
    kind: str, ends: Callable[[list[MaskedBase]], None], compact_grads: bool
) -> None:
    model = partly_frozen()
    before = requires_grad(model)
    assert before == ["0.weight", "0.bias", "1.bias", "2.weight"]
    optimizers = [BUILDERS[kind](model.named_parameters(), mask_of(model), compact_grads=compact_grads)]
    assert requires_grad(model) == list(TRAINED)
    model(torch.ones(3, 13)).square().sum().backward()
    optimizers[0].step()
    optimizers[0].set_mask(only(model, {"1.weight": True}))
    assert requires_grad(model) == ["1.weight"]
    ends(optimizers)
    assert requires_grad(model) == before
    model(torch.ones(3, 13)).square().sum().backward()  # no hook takes the gradients any more
    assert [name for name, p in model.named_parameters() if p.grad is not None and p.requires_grad] == before


def test_release_gives_back_once() -> None:
    """What others decide afterwards stands."""
    model = partly_frozen()
    optimizers = [masked_adamw(model.named_parameters(), mask_of(model))]
    optimizers[0].release()
    model.requires_grad_(False)
    optimizers[0].release()
    collected(optimizers)
    assert requires_grad(model) == []


@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("ends", WAYS)
@pytest.mark.parametrize("kind", BUILDERS)
def test_the_full_norm_after_an_earlier_optimizer_is_that_of_everything(
    kind: str, ends: Callable[[list[MaskedBase]], None], compact_grads: bool
) -> None:
    model, twin = small_model(torch.float32), small_model(torch.float32)
    earlier = [BUILDERS[kind](model.named_parameters(), mask_of(model), compact_grads=compact_grads)]
    ends(earlier)
    optimizer = BUILDERS[kind](model.named_parameters(), mask_of(model), clip_norm="full", compact_grads=compact_grads)
    for each in (model, twin):
        each(torch.ones(3, 13)).square().sum().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in twin.parameters()]).norm()
    assert relative(optimizer.grad_norm(), expected) <= RELATIVE
    assert float(optimizer.grad_norms()["masked"]) < 0.9 * float(expected)
