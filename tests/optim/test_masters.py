"""How masters are kept beside the weights: what is stored, what is rounded, and who else may write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits, set_gradients, small_model
from masked_optimizers import Build, differing, masked_adamw, masked_sgd, state_of, wrapped

from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW, MaskedBase, MaskedSGD
from subnet_ft.optim.masters import master_dtype


@pytest.mark.parametrize(
    ("weights", "master", "kept"),
    [
        (torch.bfloat16, "fp32", torch.float32),
        (torch.bfloat16, "remainder", torch.int16),
        (torch.bfloat16, "stochastic", None),
        (torch.bfloat16, "none", torch.int16),
        (torch.float16, "remainder", torch.float32),
        (torch.float16, "stochastic", torch.float32),
        (torch.float32, "fp32", None),
        (torch.float32, "remainder", None),
    ],
)
def test_master_dtype(weights: torch.dtype, master: str, kept: torch.dtype | None) -> None:
    assert master_dtype(weights, master) == kept


def trained(master: str, seed: int, steps: int = 20) -> tuple[torch.nn.Module, MaskedAdamW]:
    model = small_model(torch.bfloat16)
    optimizer = MaskedAdamW(
        model.named_parameters(), random_mask(model, 0.4), lr=1e-3, max_grad_norm=None, master=master, seed=seed
    )
    for step in range(steps):
        set_gradients(model, step)
        optimizer.step()
    return model, optimizer


def test_stochastic_rounding_keeps_no_master_and_gives_replicas_the_same_bits() -> None:
    (one, optimizer), (two, _), (other, _) = (trained("stochastic", seed) for seed in (1, 1, 2))
    assert all("master" not in values for values in optimizer.state.values())
    assert optimizer.memory()["masters"] == 0
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(same_bits(a.detach(), b.detach()) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    start = small_model(torch.bfloat16)
    for (name, parameter), before in zip(one.named_parameters(), start.parameters(), strict=True):
        off = ~optimizer.mask[name]
        assert same_bits(parameter.detach()[off], before.detach()[off])


@pytest.mark.parametrize("optimizer_cls", [MaskedAdamW, MaskedSGD])
def test_no_masters_forget_at_every_step_what_rounding_lost(optimizer_cls: Any) -> None:
    model, reference = small_model(torch.bfloat16), small_model(torch.bfloat16)
    mask = random_mask(model, 0.4)
    optimizer = optimizer_cls(model.named_parameters(), mask, lr=1e-3, max_grad_norm=None, master="none")
    # The same updates with exact masters, which are the rounded weights again before every step.
    exact = optimizer_cls(reference.named_parameters(), mask, lr=1e-3, max_grad_norm=None)
    for step in range(20):
        set_gradients(model, step)
        set_gradients(reference, step)
        optimizer.step()
        exact.step()
        for values, parameter in zip(exact.state.values(), reference.parameters(), strict=True):
            values["master"].copy_(parameter.detach().float()[mask_of(exact, parameter)])
    assert all(
        same_bits(a.detach(), b.detach()) for a, b in zip(model.parameters(), reference.parameters(), strict=True)
    )
    kept, _ = trained("fp32", 0)
    assert not all(
        same_bits(a.detach(), b.detach()) for a, b in zip(model.parameters(), kept.parameters(), strict=True)
    )


def mask_of(optimizer: MaskedBase, parameter: torch.nn.Parameter) -> torch.Tensor:
    return next(optimizer.mask[name] for found, name in optimizer._names.items() if found is parameter)


def test_stochastic_rounding_moves_weights_by_steps_below_their_rounding() -> None:
    size = 20_000
    parameter = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    optimizer = MaskedAdamW(
        [("w", parameter)], SubnetMask.full({"w": (size,)}), lr=1e-4, max_grad_norm=None, master="stochastic"
    )
    for _ in range(20):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    moved = 1.0 - parameter.detach().double().mean()
    # 20 steps of 1e-4; a step of bfloat16 below 1 is 0.0039, so rounding to nearest would not move at all. The bound is
    # four standard errors of a mean over the weights.
    assert float(moved) == pytest.approx(20e-4, abs=4 * (20 * 1e-4 * 0.0039 / size) ** 0.5)


@pytest.mark.parametrize("how", ["by torch", "by loading a state"])
def test_a_weight_that_somebody_else_wrote_is_overwritten_by_its_master(how: str) -> None:
    model, optimizer = trained("fp32", 0, steps=2)
    expected, other = trained("fp32", 0, steps=2)
    if how == "by torch":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[optimizer.mask[optimizer._names[parameter]]] += 0.5
    else:
        state = {name: torch.where(optimizer.mask[name], 7.0, p.detach()) for name, p in model.named_parameters()}
        model.load_state_dict(state)
    for each, its in ((model, optimizer), (expected, other)):
        for group in its.param_groups:
            group["lr"] = 0.0  # no rounding changes, so only what was written decides
        set_gradients(each, 9)
        its.step()
    assert all(
        same_bits(a.detach(), b.detach()) for a, b in zip(model.parameters(), expected.parameters(), strict=True)
    )


def test_a_step_tells_autograd_that_it_changed_the_weights() -> None:
    model = small_model(torch.float32)
    optimizer = MaskedAdamW(model.named_parameters(), random_mask(model, 0.5), max_grad_norm=None)
    loss = model(torch.randn(3, 13, requires_grad=True)).square().sum()
    set_gradients(model, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


KINDS: dict[str, tuple[Build, dict[str, Any]]] = {
    "AdamW, fp32": (masked_adamw, {}),
    "AdamW, remainders": (masked_adamw, {"master": "remainder"}),
    "AdamW, stochastic": (masked_adamw, {"master": "stochastic"}),
    "SGD": (masked_sgd, {}),
    "wrapped NAdam": (wrapped(torch.optim.NAdam), {}),
}


def stepped(kind: str, steps: range = range(3)) -> tuple[torch.nn.Module, MaskedBase]:
    build, options = KINDS[kind]
    model = small_model(torch.bfloat16)
    optimizer = build(model.named_parameters(), random_mask(model, 0.4), **options)
    for step in steps:
        set_gradients(model, step)
        optimizer.step()
    return model, optimizer


def _loaded(kind: str, model: torch.nn.Module, optimizer: MaskedBase) -> MaskedBase:
    """Return an optimizer of the same weights that took the state over and no step since."""
    build, options = KINDS[kind]
    saved, mask = copy.deepcopy(optimizer.state_dict()), optimizer.mask
    optimizer.release()
    fresh = build(model.named_parameters(), mask, **options)
    fresh.load_state_dict(saved)
    return fresh


def _remasked(kind: str, model: torch.nn.Module, optimizer: MaskedBase) -> MaskedBase:
    optimizer.set_mask(random_mask(model, 0.4, seed=5))
    return optimizer


AFTER: dict[str, Callable[[str, torch.nn.Module, MaskedBase], MaskedBase]] = {
    "a step": lambda kind, model, optimizer: optimizer,
    "loading": _loaded,
    "another mask": _remasked,
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("kind", KINDS)
def test_adopt_weights_keeps_the_masters_of_weights_that_nobody_wrote(kind: str, after: str) -> None:
    model, optimizer = stepped(kind)
    optimizer = AFTER[after](kind, model, optimizer)
    before = state_of(optimizer)
    optimizer.adopt_weights()
    assert differing(state_of(optimizer), before) == []


@pytest.mark.parametrize("kind", KINDS)
def test_adopt_weights_makes_written_weights_their_own_masters_and_keeps_the_moments(kind: str) -> None:
    model, optimizer = stepped(kind)
    before = state_of(optimizer)
    weight = model[0].weight
    with torch.no_grad():
        weight.mul_(2.0)
    optimizer.adopt_weights()
    master = optimizer.state[weight].get("master")
    chosen = weight.detach()[optimizer.mask["0.weight"]]
    if master is not None:
        assert torch.equal(master, chosen.float() if master.is_floating_point() else torch.zeros_like(master))
    expected = [] if master is None else ["0.weight/master"]
    assert differing(state_of(optimizer), before) == expected
