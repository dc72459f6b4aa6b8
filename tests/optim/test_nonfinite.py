"""Gradients that are NaN or infinite: raised, skipped or ignored, by every optimizer, compact and dense."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers import random_mask, set_gradients, small_model
from masked_optimizers import BUILDERS, differing, masked_adamw, masked_sgd, only, state_of, weights_of

from subnet_ft.errors import NonFiniteGradientError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedBase

FROZEN = "0.bias"
HIT = "2.weight"
BAD = [float("nan"), float("inf"), float("-inf")]
CLIPPED: list[dict[str, Any]] = [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": 0.5, "clip_norm": "full"}]


def partial_mask(model: torch.nn.Module) -> SubnetMask:
    """Mask a third of every tensor, the first weight of `HIT` included, and nothing of `FROZEN`."""
    drawn = random_mask(model, 0.3)
    dense = {name: drawn[name] for name in drawn.names if name != FROZEN}
    dense[HIT].view(-1)[0] = True
    return only(model, dense)


def build(kind: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[torch.nn.Module, MaskedBase]:
    model = small_model(dtype)
    return model, BUILDERS[kind](model.named_parameters(), partial_mask(model), **options)


def good_step(model: torch.nn.Module, optimizer: MaskedBase, step: int) -> None:
    set_gradients(model, step)
    optimizer.step()
    optimizer.zero_grad()


def spoil(model: torch.nn.Module, value: float, name: str = HIT, where: slice = slice(0, 1)) -> None:
    """Set the gradients of step 100, with a bad value in one tensor."""
    set_gradients(model, 100)
    dict(model.named_parameters())[name].grad.view(-1)[where] = value


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("options", CLIPPED)
@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_step_with_a_bad_gradient_is_as_if_it_had_not_been(
    nonfinite: str,
    kind: str,
    compact_grads: bool,
    options: dict[str, Any],
    value: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = {**options, "compact_grads": compact_grads, "nonfinite": nonfinite}
    model, optimizer = build(kind, **given)
    twin, untroubled = build(kind, **given)
    for step in range(2):
        good_step(model, optimizer, step)
        good_step(twin, untroubled, step)
    before = weights_of(model), state_of(optimizer)
    spoil(model, value)
    with caplog.at_level(logging.WARNING):
        if nonfinite == "raise":
            with pytest.raises(NonFiniteGradientError, match=f"no weight was changed.*in `{HIT}`"):
                optimizer.step()
            assert caplog.messages == []
        else:
            optimizer.step()
            assert caplog.messages == [f"step left out, 1 so far: the gradient has NaN or infinite values in `{HIT}`"]
    assert optimizer.num_skipped_steps == (nonfinite == "skip")
    assert differing(weights_of(model), before[0]) == []  # momentum and weight decay included
    assert differing(state_of(optimizer), before[1]) == []  # step counts included
    optimizer.zero_grad()
    for step in range(2, 4):
        good_step(model, optimizer, step)
        good_step(twin, untroubled, step)
    assert differing(weights_of(model), weights_of(twin)) == []
    assert differing(state_of(optimizer), state_of(untroubled)) == []
    assert differing(weights_of(model), before[0]) != []


@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_bad_gradient_in_the_first_step_leaves_no_state(kind: str, compact_grads: bool) -> None:
    model, optimizer = build(kind, compact_grads=compact_grads, nonfinite="skip")
    start = weights_of(model)
    spoil(model, float("nan"))
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.state_dict()["state"] == {}
    assert differing(weights_of(model), start) == []
    twin, untroubled = build(kind, compact_grads=compact_grads)
    good_step(model, optimizer, 0)
    good_step(twin, untroubled, 0)
    assert differing(weights_of(model), weights_of(twin)) == []


@pytest.mark.parametrize("by_hand", [True, False], ids=["clip_grad_norm_", "max_grad_norm"])
@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("kind", BUILDERS)
def test_after_raise_a_loop_that_clears_only_the_model_goes_on(kind: str, compact_grads: bool, by_hand: bool) -> None:
    """Trainers call `model.zero_grad()`, not the optimizer's; nothing of the bad step may reach a later one."""
    options = {"compact_grads": compact_grads, "max_grad_norm": None if by_hand else 0.5}
    model, optimizer = build(kind, **options)
    twin, untroubled = build(kind, **options)
    spoil(model, float("nan"))
    if by_hand:
        optimizer.clip_grad_norm_(0.5)
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    model.zero_grad()
    for each, its in ((model, optimizer), (twin, untroubled)):
        set_gradients(each, 1)
        if by_hand:
            its.clip_grad_norm_(0.5)
        its.step()
    assert differing(weights_of(model), weights_of(twin)) == []
    assert all(value.isfinite().all() for value in weights_of(model).values())


@pytest.mark.parametrize("options", CLIPPED[:2])
@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("kind", BUILDERS)
def test_ignore_lets_nan_reach_the_mask_and_nothing_else(
    kind: str, compact_grads: bool, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = build(kind, torch.float32, compact_grads=compact_grads, nonfinite="ignore", **options)
    start = weights_of(model)
    spoil(model, float("nan"))
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    assert caplog.messages == []
    assert optimizer.num_skipped_steps == 0
    chosen = {name: optimizer.mask[name] for name in start}
    found = weights_of(model)
    assert found[HIT].view(-1)[0].isnan()
    if options:  # a coefficient of NaN, as torch's clip_grad_norm_ would make it
        assert all(value[chosen[name]].isnan().all() for name, value in found.items())
    assert differing(
        {name: value[~chosen[name]] for name, value in found.items()},
        {name: value[~chosen[name]] for name, value in start.items()},
    ) == []  # fmt: skip


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", [HIT, FROZEN])
@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("kind", BUILDERS)
def test_off_the_mask_a_bad_value_counts_only_in_the_full_norm(
    kind: str, compact_grads: bool, where: str, value: float
) -> None:
    options = {"compact_grads": compact_grads, "measure_full_norm": True, "max_grad_norm": 0.5}
    model, optimizer = build(kind, **options)
    twin, untroubled = build(kind, **options)
    for each in (model, twin):
        set_gradients(each, 0)
    off = (~optimizer.mask[where]).view(-1)
    dict(model.named_parameters())[where].grad.view(-1)[off] = value
    assert optimizer.grad_norm().isfinite()
    assert not optimizer.grad_norms()["full"].isfinite()
    for its in (optimizer, untroubled):
        its.step()
    assert differing(weights_of(model), weights_of(twin)) == []

    model, optimizer = build(kind, **{**options, "clip_norm": "full"})
    start = weights_of(model)
    set_gradients(model, 0)
    dict(model.named_parameters())[where].grad.view(-1)[off] = value
    with pytest.raises(NonFiniteGradientError, match="outside the mask"):
        optimizer.step()
    assert differing(weights_of(model), start) == []


def test_the_message_counts_the_tensors() -> None:
    model, optimizer = build("MaskedAdamW")
    spoil(model, float("nan"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad[...] = float("inf")
    with pytest.raises(NonFiniteGradientError, match=r"in `0\.weight` and 4 other tensors"):
        optimizer.step()


def test_skipped_steps_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = build("MaskedSGD", nonfinite="skip")
    for _ in range(3):
        spoil(model, float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.num_skipped_steps == 3
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "step left out, 1 so far", "step left out, 2 so far", "step left out, 3 so far",
    ]  # fmt: skip


@pytest.mark.parametrize("build_one", [masked_adamw, masked_sgd])
def test_one_bad_micro_batch_spoils_the_step_it_is_part_of(build_one: Any) -> None:
    model = small_model(torch.float32)
    optimizer = build_one(model.named_parameters(), partial_mask(model), nonfinite="skip")
    start = weights_of(model)
    for batch in (torch.ones(3, 13), torch.full((3, 13), float("nan")), torch.ones(3, 13)):
        model(batch).square().sum().backward()
    optimizer.step()
    assert optimizer.num_skipped_steps == 1
    assert differing(weights_of(model), start) == []
    model(torch.ones(3, 13)).square().sum().backward()  # the skipped gradients are gone, without zero_grad
    optimizer.step()
    assert all(value.isfinite().all() for value in weights_of(model).values())
    assert differing(weights_of(model), start) != []


def test_a_bad_micro_batch_after_clipping_is_seen() -> None:
    model = small_model(torch.float32)
    optimizer = masked_adamw(model.named_parameters(), partial_mask(model))
    start = weights_of(model)
    model(torch.ones(3, 13)).square().sum().backward()
    optimizer.clip_grad_norm_(1.0)
    model(torch.full((3, 13), float("nan"))).square().sum().backward()
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    assert differing(weights_of(model), start) == []
