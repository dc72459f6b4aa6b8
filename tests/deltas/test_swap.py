"""`WeightSwap`: defined after an interrupt at any line, unseen by graphs of another side, no weights in two places."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from deltas.random_deltas import Weights, delta_of, weights_of
from deltas.test_applied import check_same
from helpers import small_model
from interrupts import interrupted_at

from subnet_ft.deltas import HotSwap, applied, swap
from subnet_ft.errors import SwapError

FILES = tuple(f"/subnet_ft/deltas/{name}.py" for name in ("swap", "pieces", "counters", "hot_swap"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """An interrupt reaches the main thread, so that thread does all the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def at_every_line(action: Callable[[], Any], then: Callable[[], None]) -> None:
    """Interrupt an action at each of its lines in turn, and look at what it left."""
    for number in range(2000):
        try:
            with interrupted_at(number, FILES):
                action()
        except KeyboardInterrupt:
            pass
        else:
            assert number > 50
            then()
            return
        lock: Any = swap._lock
        assert not lock._is_owned()
        then()
    raise AssertionError("more lines than expected")


def test_applied_interrupted_at_any_line_leaves_the_base() -> None:
    model = small_model(torch.bfloat16)
    base, marks = weights_of(model), [p._version for p in model.parameters()]
    delta, tuned = delta_of(model)

    def enter_and_leave() -> None:
        with applied(model, delta, check_base=False):
            pass

    def check() -> None:
        check_same(weights_of(model), base)
        assert [p._version for p in model.parameters()] == marks
        with applied(model, delta):
            check_same(weights_of(model), tuned)

    at_every_line(enter_and_leave, check)


@pytest.mark.parametrize("switch", [("a", "b"), (None, "a"), ("a", None), ("a", "empty"), ("empty", "a")])
def test_hot_swap_interrupted_at_any_line_says_what_is_in_the_model(switch: tuple[str | None, str | None]) -> None:
    model = small_model(torch.bfloat16)
    bank = HotSwap(model)
    marks = [p._version for p in model.parameters()]
    expected: dict[str | None, Weights] = {None: weights_of(model)}
    for seed, name in enumerate("ab"):
        delta, expected[name] = delta_of(model, seed=seed, without=("0.bias", "2.weight")[seed])
        bank.add(name, delta)
    delta, expected["empty"] = delta_of(model, density=0.0)
    bank.add("empty", delta)
    before, after = switch

    def go_to(name: str | None) -> None:
        bank.deactivate() if name is None else bank.activate(name)
        check_same(weights_of(model), expected[name])

    def check() -> None:
        assert bank.active in (None, before, after)
        check_same(weights_of(model), expected[bank.active])
        go_to(None)
        assert [p._version for p in model.parameters()] == marks
        go_to(before)

    go_to(before)
    at_every_line(lambda: bank.deactivate() if after is None else bank.activate(after), check)


def test_hot_swap_using_interrupted_at_any_line_goes_back() -> None:
    model = small_model(torch.bfloat16)
    bank = HotSwap(model)
    base = weights_of(model)
    bank.add("a", delta_of(model)[0])

    def use() -> None:
        with bank.using("a"):
            pass

    def check() -> None:
        bank.deactivate()
        check_same(weights_of(model), base)

    at_every_line(use, check)


def test_hot_swap_refuses_a_backward_pass_with_another_delta_than_its_forward_pass() -> None:
    model = small_model(torch.float32)
    bank = HotSwap(model)
    for seed, name in enumerate("ab"):
        bank.add(name, delta_of(model, seed=seed)[0])
    inputs = torch.ones(2, 13)
    bank.activate("a")
    inside = model(inputs).sum()
    bank.activate("b")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward(retain_graph=True)
    bank.deactivate()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0)  # one write: as many as an exchange counted for
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()


def assign(model: torch.nn.Module) -> None:
    """Put other parameters in the place of the model's own."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def test_hot_swap_refuses_parameters_that_were_replaced() -> None:
    model = small_model(torch.bfloat16)
    bank = HotSwap(model)
    bank.add("a", delta_of(model)[0])
    assign(model)
    with pytest.raises(SwapError, match=r"6 parameters .* not those that the delta `a` was prepared for: `0.weight`"):
        bank.activate("a")
    assert bank.active is None


def test_applied_says_that_parameters_were_replaced_inside() -> None:
    model = small_model(torch.bfloat16)
    base, (delta, tuned) = weights_of(model), delta_of(model)
    old = dict(model.named_parameters())
    with pytest.raises(SwapError, match="Somebody wrote to 6 tensors"), applied(model, delta):
        assign(model)
    check_same({name: parameter.detach() for name, parameter in old.items()}, base)
    check_same(weights_of(model), tuned)  # what was written is there


def test_hot_swap_notices_that_parameters_were_replaced_while_a_delta_was_active() -> None:
    model = small_model(torch.bfloat16)
    bank = HotSwap(model)
    for seed, name in enumerate("ab"):
        bank.add(name, delta_of(model, seed=seed)[0])
    bank.activate("a")
    assign(model)
    with pytest.raises(SwapError, match="Somebody wrote to 6 tensors while the delta `a`"):
        bank.activate("b")
    assert bank.active is None


@pytest.mark.parametrize("without", ["", "2.weight"])
def test_applied_refuses_two_parameters_in_one_place(without: str) -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(13, 13), torch.nn.Tanh(), torch.nn.Linear(13, 13))
    model[2].weight.data = model[0].weight.data
    base = weights_of(model)
    delta, _ = delta_of(model, without=without)
    with (
        pytest.raises(SwapError, match=r"`[02].weight` and `[02].weight` share memory"),
        applied(model, delta),
    ):
        pass
    check_same(weights_of(model), base)
    with contextlib.suppress(SwapError), applied(model, delta):
        pass
    check_same(weights_of(model), base)
