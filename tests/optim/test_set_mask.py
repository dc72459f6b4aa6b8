"""Another mask in the middle of training: what is kept, what starts anew, and what stands still."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits, set_gradients, small_model
from masked_optimizers import (
    BUILDERS,
    Build,
    Stack,
    differing,
    masked_adamw,
    masked_sgd,
    only,
    state_of,
    weights_of,
    wrapped,
)
from wrapped_optimizers import Counting, Lion

from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedBase

Dense = dict[str, torch.Tensor]

KINDS: dict[str, tuple[Build, dict[str, Any], torch.dtype]] = {
    "AdamW on fp32": (masked_adamw, {}, torch.float32),
    "AdamW, fp32 masters": (masked_adamw, {"master": "fp32"}, torch.bfloat16),
    "AdamW, remainders": (masked_adamw, {"master": "remainder"}, torch.bfloat16),
    "AdamW, stochastic": (masked_adamw, {"master": "stochastic"}, torch.bfloat16),
    "AdamW on fp16": (masked_adamw, {}, torch.float16),
    "AdamW, dense gradients": (masked_adamw, {"compact_grads": False}, torch.bfloat16),
    "SGD with momentum": (masked_sgd, {"nesterov": True}, torch.bfloat16),
    "SGD without": (masked_sgd, {"momentum": 0.0}, torch.float32),
    "SGD with momentum, remainders": (masked_sgd, {"master": "remainder"}, torch.bfloat16),
    "wrapped RAdam": (wrapped(torch.optim.RAdam, weight_decay=0.1), {}, torch.bfloat16),
    "wrapped NAdam": (wrapped(torch.optim.NAdam, weight_decay=0.1), {}, torch.float32),
    "wrapped SGD": (wrapped(torch.optim.SGD, momentum=0.9, weight_decay=0.1), {}, torch.bfloat16),
    "wrapped SGD without momentum": (wrapped(torch.optim.SGD), {}, torch.bfloat16),
    "wrapped Adam": (wrapped(torch.optim.Adam, amsgrad=True), {}, torch.bfloat16),
    "wrapped Adamax": (wrapped(torch.optim.Adamax), {"compact_grads": False}, torch.bfloat16),
    "wrapped RMSprop": (wrapped(torch.optim.RMSprop, momentum=0.9), {}, torch.bfloat16),
    "wrapped Lion": (wrapped(Lion, weight_decay=0.1), {}, torch.float32),
    "wrapped counter": (wrapped(Counting), {}, torch.bfloat16),
}
"""Optimizers, options and dtypes of the weights: all that can take a grown mask."""


def drawn(seed: int, density: float = 0.4) -> Dense:
    """Draw dense masks of a `Stack`."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) < density for n, p in Stack(torch.float32).named_parameters()}


def _shrink(dense: Dense) -> Dense:
    other = drawn(7, 0.5)
    return {name: value & other[name] for name, value in dense.items()}


def _grow(dense: Dense) -> Dense:
    other = drawn(8, 0.3)
    return {name: value | other[name] for name, value in dense.items()}


CHANGES: dict[str, Callable[[Dense], Dense]] = {
    "shrink": _shrink,
    "grow": _grow,
    "another": lambda dense: drawn(9),
    "disjoint": lambda dense: {name: ~value for name, value in dense.items()},
    "the same": lambda dense: dense,
    "enters and leaves whole": lambda dense: {
        **dense,
        "matrix": torch.zeros_like(dense["matrix"]),
        "head": torch.ones_like(dense["head"]),
        "experts": dense["experts"] | ~dense["experts"],
    },
    "one weight is left": lambda dense: {
        name: value & (torch.arange(value.numel()).view(value.shape) == int(value.flatten().nonzero()[-1]))
        if name == "experts"
        else torch.zeros_like(value)
        for name, value in dense.items()
    },
}


def start(kind: str, *, trains_head: bool) -> tuple[torch.nn.Module, MaskedBase, Dense]:
    """Return a model after three steps, its optimizer and its dense masks."""
    build, options, dtype = KINDS[kind]
    model, dense = Stack(dtype), drawn(1)
    dense["head"] &= trains_head
    optimizer = build(model.named_parameters(), SubnetMask.from_dense(dense), **options)
    train(model, optimizer, range(3))
    return model, optimizer, dense


def train(model: torch.nn.Module, optimizer: MaskedBase, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


def expected_state(kind: str, model: torch.nn.Module, optimizer: MaskedBase, old: Dense, new: Dense) -> Dense:
    """Say what the state must be under another mask, by way of dense tensors.

    Kept weights have what they had. Entering ones have moments of zero and the master of their value: its float32, or
    a remainder of zero. Numbers stay, and tensors without a weight left have no state.
    """
    expected = {}
    for name, parameter in model.named_parameters():
        if not new[name].any():
            continue
        for key, value in state_of(optimizer).items():
            owner, _, entry = key.partition("/")
            if owner != name:
                continue
            if not value.dim():
                expected[key] = value
                continue
            fresh = (
                parameter.detach() if entry == "master" and value.is_floating_point() else torch.zeros(old[name].shape)
            )
            full = fresh.to(value.dtype)
            full[old[name]] = value
            expected[key] = full[new[name]]
    return expected


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_set_mask_keeps_the_state_of_kept_weights_and_starts_the_others(kind: str, change: str) -> None:
    model, optimizer, old = start(kind, trains_head=change not in ("enters and leaves whole", "grow"))
    new = CHANGES[change](old)
    weights = weights_of(model)
    expected = expected_state(kind, model, optimizer, old, new)
    mask = SubnetMask.from_dense(new)
    optimizer.set_mask(mask)
    assert differing(weights_of(model), weights) == []
    assert differing(state_of(optimizer), expected) == []
    assert optimizer.mask is mask
    assert {group["mask_fingerprint"] for group in optimizer.param_groups} == {mask.fingerprint}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n in new if new[n].any()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_set_mask_stops_what_left_and_trains_what_entered(kind: str, change: str) -> None:
    model, optimizer, old = start(kind, trains_head=change not in ("enters and leaves whole", "grow"))
    new = CHANGES[change](old)
    optimizer.set_mask(SubnetMask.from_dense(new))
    weights = weights_of(model)
    train(model, optimizer, range(3, 8))
    found = weights_of(model)
    for name, chosen in new.items():
        assert same_bits(found[name][~chosen], weights[name][~chosen])
        for part in (chosen & old[name], chosen & ~old[name]):
            # Few weights may all be too large for bfloat16 to show five small steps.
            assert (found[name] != weights[name])[part].any() or part.sum() < 5
    optimizer.audit()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_set_mask_then_save_goes_on_in_a_fresh_optimizer_to_the_same_bits(
    kind: str, change: str, tmp_path: Path
) -> None:
    model, optimizer, old = start(kind, trains_head=change not in ("enters and leaves whole", "grow"))
    mask = SubnetMask.from_dense(CHANGES[change](old))
    optimizer.set_mask(mask)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, range(3, 6))
    build, options, dtype = KINDS[kind]
    other = Stack(dtype)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    resumed = build(other.named_parameters(), mask, **options)
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, range(3, 6))
    assert differing(weights_of(other), weights_of(model)) == []
    assert differing(state_of(resumed), state_of(optimizer)) == []
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("kind", KINDS)
def test_set_mask_before_the_first_step_is_as_if_built_on_the_new_mask(kind: str) -> None:
    build, options, dtype = KINDS[kind]
    weights, states = [], []
    for changes in (True, False):
        model, first, second = Stack(dtype), SubnetMask.from_dense(drawn(1)), SubnetMask.from_dense(drawn(2))
        optimizer = build(model.named_parameters(), first if changes else second, **options)
        if changes:
            optimizer.set_mask(second)
        train(model, optimizer, range(3))
        weights.append(weights_of(model))
        states.append(state_of(optimizer))
    assert differing(*weights) == []
    assert differing(*states) == []


@pytest.mark.parametrize("kind", KINDS)
def test_set_mask_there_and_back_forgets_what_left(kind: str) -> None:
    """A tensor that leaves whole and comes back starts at its first step again, from where its weights stand."""
    model, optimizer, old = start(kind, trains_head=True)
    away = {**old, "matrix": torch.zeros_like(old["matrix"])}
    optimizer.set_mask(SubnetMask.from_dense(away))
    train(model, optimizer, range(3, 5))
    assert not any(key.startswith("matrix/") for key in state_of(optimizer))
    optimizer.set_mask(SubnetMask.from_dense(old))
    assert not any(key.startswith("matrix/") for key in state_of(optimizer))
    build, options, dtype = KINDS[kind]
    twin = Stack(dtype)
    twin.load_state_dict(model.state_dict())
    fresh = build(twin.named_parameters(), SubnetMask.from_dense(old), **options)
    for each, its in ((model, optimizer), (twin, fresh)):
        train(each, its, range(5, 6))
    assert same_bits(model.matrix.detach(), twin.matrix.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_start_over_is_as_if_built_on_that_mask(kind: str) -> None:
    """Nothing of the run before is left but the weights, whoever wrote them in the meantime."""
    model, optimizer, _ = start(kind, trains_head=False)
    mask = SubnetMask.from_dense(drawn(2))
    set_gradients(model, 99)
    for parameter in model.parameters():
        parameter.data.mul_(2.0)  # off the first mask, too: an audit by it would fail
    optimizer.start_over(mask)
    assert state_of(optimizer) == {}
    assert optimizer.frozen_fingerprints is None
    model.zero_grad()
    twin = Stack(KINDS[kind][2])
    twin.load_state_dict(model.state_dict())
    build, options, _ = KINDS[kind]
    fresh = build(twin.named_parameters(), mask, **options)
    for each, its in ((model, optimizer), (twin, fresh)):
        train(each, its, range(5, 7))
    assert differing(weights_of(model), weights_of(twin)) == []
    assert differing(state_of(optimizer), state_of(fresh)) == []
    optimizer.audit()


@pytest.mark.parametrize("compact_grads", [True, False])
@pytest.mark.parametrize("kind", BUILDERS)
def test_set_mask_moves_gradients_to_what_trains_now(kind: str, compact_grads: bool) -> None:
    model = small_model(torch.float32)
    optimizer = BUILDERS[kind](model.named_parameters(), only(model, {"0.weight": True}), compact_grads=compact_grads)
    batch = torch.randn(3, 13)

    def arrived() -> set[str]:
        seen = set()
        handles = [
            p.register_hook(lambda grad, name=name: seen.add(name)) for name, p in model.named_parameters()
            if p.requires_grad
        ]  # fmt: skip
        model(batch).square().sum().backward()
        for handle in handles:
            handle.remove()
        return seen

    for trained in (["0.weight"], ["2.weight", "1.bias"], ["0.weight", "2.weight"], ["2.bias"]):
        mask = only(model, dict.fromkeys(trained, True))
        optimizer.set_mask(mask)
        before = weights_of(model)
        assert arrived() == set(trained)
        with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
        assert with_grad == (set() if compact_grads else set(trained))
        optimizer.step()
        optimizer.zero_grad()
        assert set(differing(weights_of(model), before)) == set(trained)
        buffers = sum(buffer.numel() for buffer in optimizer.gradient_buffers())
        assert buffers == (mask.num_trainable if compact_grads else 0)


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_schedule_built_before_set_mask_reaches_groups_that_were_or_become_empty(kind: str) -> None:
    model = small_model(torch.float32)
    matrices = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    vectors = [(n, p) for n, p in model.named_parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1, "lr": 4e-2}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = BUILDERS[kind](groups, only(model, {"0.weight": True}))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    held = optimizer.param_groups[1]
    names = [["0.weight"], []], [[], ["2.bias"]], [["0.weight", "2.weight"], ["0.bias"]]
    for number, expected in enumerate(names):
        optimizer.set_mask(only(model, {name: True for group in expected for name in group}))
        assert [group["param_names"] for group in optimizer.param_groups] == expected
        assert optimizer.param_groups[1] is held
        assert [group["lr"] for group in optimizer.param_groups] == [4e-2 * 0.5**number, 1e-2 * 0.5**number]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
        before = weights_of(model)
        train(model, optimizer, range(number, number + 1))
        assert set(differing(weights_of(model), before)) == {name for group in expected for name in group}
        schedule.step()


def test_set_mask_after_the_rate_became_zero_moves_nothing() -> None:
    """The schedule's rate is the one that the next step takes, also for a tensor that enters."""
    for kind in BUILDERS:
        model = small_model(torch.float32)
        optimizer = BUILDERS[kind](model.named_parameters(), only(model, {"0.weight": True}), weight_decay=0.0)
        train(model, optimizer, range(1))
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.set_mask(only(model, {"2.weight": True}))
        before = weights_of(model)
        train(model, optimizer, range(1, 3))
        assert differing(weights_of(model), before) == []
