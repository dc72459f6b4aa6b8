"""What other code does to parameters, state and groups behind the optimizer's back: noticed, or refused by name."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits, set_gradients, small_model

from subnet_ft.errors import GradientError, MaskMismatchError, OptimizerError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW, MaskedSGD
from subnet_kernels import round_to_bfloat16


def build(dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[torch.nn.Module, MaskedAdamW]:
    model = small_model(dtype)
    mask = random_mask(model, 0.4)
    return model, MaskedAdamW(model.named_parameters(), mask, **{"lr": 1e-2, "max_grad_norm": None, **options})


def train(model: torch.nn.Module, optimizer: MaskedAdamW, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()


def replace_data(model: torch.nn.Module, optimizer: MaskedAdamW) -> None:
    for values in optimizer.state.values():
        values["exp_avg"].data = values["exp_avg"].data.clone()


def replace_entries(model: torch.nn.Module, optimizer: MaskedAdamW) -> None:
    for values in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq", "master"):
            values[key] = values[key].clone()


def move_weights(model: torch.nn.Module, optimizer: MaskedAdamW) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("edit", [replace_data, replace_entries, move_weights])
def test_tensors_may_move_between_two_steps(edit: Callable[[torch.nn.Module, MaskedAdamW], None]) -> None:
    (model, optimizer), (twin, other) = build(), build()
    train(model, optimizer, range(3))
    edit(model, optimizer)
    train(model, optimizer, range(3, 6))
    train(twin, other, range(6))
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    for (_, values), (_, expected) in zip(optimizer.state.items(), other.state.items(), strict=True):
        assert all(same_bits(values[key], expected[key]) for key in expected)


def test_a_state_that_was_zeroed_starts_anew() -> None:
    model, optimizer = build(torch.float32)
    train(model, optimizer, range(5))
    for values in optimizer.state.values():
        for value in values.values():
            value.zero_()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, optimizer, range(1))
    assert {float(values["step"]) for values in optimizer.state.values()} == {1.0}
    moved = torch.cat([(a - b.detach()).abs().view(-1) for a, b in zip(before, model.parameters(), strict=True)])
    torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], 1e-2), rtol=1e-3, atol=0)


def add_to_masters(model: torch.nn.Module, optimizer: MaskedAdamW) -> None:
    for values in optimizer.state.values():
        values["master"].add_(1.0)


def new_weights(model: torch.nn.Module, optimizer: MaskedAdamW) -> None:
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter.data, 3.0)


@pytest.mark.parametrize("edit", [add_to_masters, new_weights])
def test_weights_are_their_masters_rounded_whoever_wrote(edit: Callable[[torch.nn.Module, MaskedAdamW], None]) -> None:
    model, optimizer = build(lr=1e-6)
    train(model, optimizer, range(2))
    edit(model, optimizer)
    train(model, optimizer, range(2, 3))
    for name, parameter in model.named_parameters():
        rounded = round_to_bfloat16(optimizer.state[parameter]["master"])
        assert same_bits(parameter.detach()[optimizer.mask[name]], rounded)


def test_a_dense_gradient_that_was_dropped_is_free() -> None:
    model, optimizer = build(compact_grads=False)
    set_gradients(model, 0)
    grads = [weakref.ref(parameter.grad) for parameter in model.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert [grad() for grad in grads] == [None] * len(grads)


def test_release_frees_what_the_optimizer_says_it_frees() -> None:
    model, optimizer = build()
    train(model, optimizer, range(1))
    buffers = [weakref.ref(buffer) for buffer in optimizer._gradients._buffers.values()]
    assert buffers
    optimizer.release()
    gc.collect()
    assert [buffer() for buffer in buffers] == [None] * len(buffers)
    assert optimizer.memory()["gradients"] == 0


def test_a_refused_second_optimizer_leaves_the_model_as_it_was() -> None:
    model, optimizer = build()
    other = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    other["0.weight"][0, 0] = True
    with pytest.raises(GradientError, match="already belong to another masked optimizer"):
        MaskedAdamW(model.named_parameters(), SubnetMask.from_dense(other), max_grad_norm=None)
    assert all(parameter.requires_grad for parameter in model.parameters())
    train(model, optimizer, range(1))
    assert len(optimizer.state) == len(list(model.parameters()))


def test_a_second_optimizer_on_other_weights_of_the_same_model_is_refused() -> None:
    model = small_model(torch.float32)
    only = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    first = SubnetMask.from_dense({**only, "0.weight": torch.ones(17, 13, dtype=torch.bool)})
    second = SubnetMask.from_dense({**only, "2.weight": torch.ones(5, 17, dtype=torch.bool)})
    optimizer = MaskedAdamW(model.named_parameters(), first, max_grad_norm=None)
    with pytest.raises(GradientError, match="already belong"):
        MaskedAdamW(model.named_parameters(), second, max_grad_norm=None, compact_grads=False)
    assert optimizer.param_groups[0]["params"][0].requires_grad


def test_a_parameter_that_took_another_ones_place_is_refused() -> None:
    model, optimizer = build()
    old = optimizer.param_groups[0]["params"][0]
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(old.detach().clone())
    set_gradients(model, 0)
    with pytest.raises(OptimizerError, match=r"shape \(17, 13\) took the place"):
        optimizer.step()


def test_a_further_group_is_refused() -> None:
    _, optimizer = build()
    with pytest.raises(OptimizerError, match="takes no further parameters"):
        optimizer.add_param_group({"params": [("q", torch.nn.Parameter(torch.zeros(2)))]})


@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_an_optimizer_is_not_copied(how: Callable[[Any], Any]) -> None:
    _, optimizer = build()
    with pytest.raises(OptimizerError, match=r"load this one.s `state_dict"):
        how(optimizer)


def test_one_parameter_under_two_names_is_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    mask = SubnetMask.full({"a": (2,), "b": (2,)})
    with pytest.raises(MaskMismatchError, match="`a` and `b` are one parameter"):
        MaskedSGD([("a", weight), ("b", weight)], mask, lr=1.0, max_grad_norm=None)


def test_a_refused_step_counts_for_nothing() -> None:
    model = small_model(torch.float32)
    optimizer = MaskedSGD(model.named_parameters(), random_mask(model, 0.4), lr=0.1, momentum=0.9, max_grad_norm=None)
    set_gradients(model, 0)
    optimizer.step()
    set_gradients(model, 1)
    norm = float(optimizer.clip_grad_norm_(0.5))
    optimizer.param_groups[0]["momentum"] = 0.0
    with pytest.raises(ValueError, match=r"`momentum` 0\.0 with a buffer"):
        optimizer.step()
    assert {float(values["step"]) for values in optimizer.state.values()} == {1.0}
    assert float(optimizer._clipping.coefficient) == pytest.approx(0.5 / norm, rel=1e-4)
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.step()
    assert {float(values["step"]) for values in optimizer.state.values()} == {2.0}


def test_the_strictest_of_several_clips_counts() -> None:
    model, optimizer = build(torch.float32)
    set_gradients(model, 0)
    norm = float(optimizer.clip_grad_norm_(1.0))
    optimizer.clip_grad_norm_(100.0)
    assert float(optimizer._clipping.coefficient) == pytest.approx(1.0 / norm, rel=1e-4)
    with pytest.raises(ValueError, match="`max_norm` must be >= 0, got -1"):
        optimizer.clip_grad_norm_(-1.0)


def test_options_that_a_schedule_made_invalid_are_refused() -> None:
    model, optimizer = build()
    set_gradients(model, 0)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="`lr` must be >= 0"):
        optimizer.step()
