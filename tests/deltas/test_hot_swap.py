"""`HotSwap`: any of many deltas of one base, in the model one at a time, and the base again, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from deltas.random_deltas import delta_of, weights_of
from deltas.test_applied import check_same
from helpers import small_model

from subnet_ft.deltas import HotSwap
from subnet_ft.errors import DeltaMismatchError, SwapError


def test_hot_swap_switches_between_deltas_and_the_base() -> None:
    model = small_model(torch.bfloat16)
    base = weights_of(model)
    bank = HotSwap(model)
    tuned = {}
    for seed, name in enumerate("abc"):
        delta, tuned[name] = delta_of(model, seed=seed)
        bank.add(name, delta)
    assert bank.names == ["a", "b", "c"]
    for name in (None, "a", "b", "b", "c", None, "a", None):
        if name is None:
            bank.deactivate()
            check_same(weights_of(model), base)
        else:
            bank.activate(name)
            check_same(weights_of(model), tuned[name])
        assert bank.active == name


def test_hot_swap_using_goes_back_to_what_was_active() -> None:
    model = small_model(torch.bfloat16)
    base = weights_of(model)
    bank = HotSwap(model)
    (first, with_first), (second, with_second) = delta_of(model, seed=1), delta_of(model, seed=2)
    bank.add("first", first)
    bank.activate("first")
    bank.add("second", second)  # while another is active
    with bank.using("second"):
        check_same(weights_of(model), with_second)
        with bank.using(None):
            check_same(weights_of(model), base)
        check_same(weights_of(model), with_second)
    check_same(weights_of(model), with_first)
    with pytest.raises(KeyError), bank.using("second"):
        raise KeyError
    assert bank.active == "first"
    bank.remove("first")
    check_same(weights_of(model), base)
    assert bank.names == ["second"]


def test_hot_swap_holds_the_values_and_masks_of_its_deltas_alone() -> None:
    model = small_model(torch.bfloat16)
    bank = HotSwap(model)
    delta, _ = delta_of(model)
    bank.add("a", delta)
    masks = bank.nbytes - 2 * delta.num_values
    assert 0 < masks < 0.2 * delta.num_parameters + 16 * len(delta.tensors) + 16
    bank.activate("a")
    assert bank.nbytes == 2 * delta.num_values + masks


def test_hot_swap_refuses_unknown_names_and_names_that_are_taken() -> None:
    model = small_model(torch.bfloat16)
    bank = HotSwap(model)
    bank.add("a", delta_of(model)[0])
    with pytest.raises(SwapError, match="no delta `b`; there are `a`"):
        bank.activate("b")
    with pytest.raises(SwapError, match="There is a delta `a` already"):
        bank.add("a", delta_of(model)[0])


def test_hot_swap_refuses_a_model_that_is_not_the_base() -> None:
    model = small_model(torch.bfloat16)
    delta, _ = delta_of(model, without="0.weight")
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(DeltaMismatchError, match=r"`0.weight` are not those of `a base`"):
        HotSwap(model).add("a", delta)  # which changes nothing of that tensor


def test_hot_swap_refuses_a_delta_of_another_base() -> None:
    model, other = small_model(torch.bfloat16), small_model(torch.bfloat16)
    with torch.no_grad():
        other[0].bias.add_(1.0)
    bank = HotSwap(model)
    bank.add("a", delta_of(model)[0])
    with pytest.raises(DeltaMismatchError, match=r"The delta `b` was made for .*: `0.bias` has fingerprint"):
        bank.add("b", delta_of(other)[0])


def test_hot_swap_notices_weights_that_were_written_while_nothing_was_active() -> None:
    model = small_model(torch.bfloat16)
    bank = HotSwap(model)
    delta, tuned = delta_of(model)
    bank.add("a", delta)
    same = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.copy_(same)  # torch says written, and the bits are the base's
    with bank.using("a"):
        check_same(weights_of(model), tuned)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(DeltaMismatchError, match=r"`0.weight` are not those of `a base`"):
        bank.activate("a")
    assert bank.active is None


def test_hot_swap_notices_weights_that_were_written_while_a_delta_was_active() -> None:
    model = small_model(torch.bfloat16)
    bank = HotSwap(model)
    bank.add("a", delta_of(model)[0])
    bank.activate("a")
    with torch.no_grad():
        model[2].weight.add_(1.0)
    with pytest.raises(SwapError, match=r"Somebody wrote to 1 tensors while the delta `a` .* `2.weight`"):
        bank.deactivate()
    assert bank.active is None


def test_hot_swap_says_that_the_model_was_cast_while_a_delta_was_active() -> None:
    model = small_model(torch.bfloat16)
    bank = HotSwap(model)
    for seed, name in enumerate("ab"):
        bank.add(name, delta_of(model, seed=seed)[0])
    bank.activate("a")
    model.float()
    with pytest.raises(SwapError, match="the delta `a` is still in it there: load the model again"):
        bank.activate("b")


def add_one(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


@pytest.mark.parametrize("harm", [add_one, torch.nn.Module.float])
@pytest.mark.parametrize("other", [None, "b"])
def test_hot_swap_refuses_a_delta_whose_values_were_lost_in_the_model(
    other: str | None, harm: Callable[[torch.nn.Module], object]
) -> None:
    model = small_model(torch.bfloat16)
    base = weights_of(model)
    bank = HotSwap(model)
    (delta, tuned), (another, with_another) = delta_of(model, seed=0), delta_of(model, seed=1)
    bank.add("a", delta)
    bank.add("b", another)
    bank.activate("a")
    harm(model)
    with pytest.raises(SwapError):
        bank.deactivate()
    model.bfloat16().load_state_dict(base)  # as the message asks
    if other is not None:
        bank.activate(other)
        check_same(weights_of(model), with_another)
    with pytest.raises(SwapError, match=r"the delta `a` lost its values of 6 tensors: `0.weight`.* add it again"):
        bank.activate("a")
    assert bank.active is None
    check_same(weights_of(model), base)
    bank.remove("a")
    bank.add("a", delta)
    bank.activate("a")
    check_same(weights_of(model), tuned)


def test_hot_swap_notices_weights_off_the_mask_that_were_written_before_a_switch() -> None:
    model = small_model(torch.bfloat16)
    bank = HotSwap(model)
    for seed, name in enumerate("ab"):
        bank.add(name, delta_of(model, seed=seed, without="0.weight")[0])
    bank.activate("a")
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(DeltaMismatchError, match=r"`0.weight` are not those of `a base`"):
        bank.activate("b")
    assert bank.active is None


def test_hot_swap_notices_values_that_were_written_unseen_by_torch_before_a_switch() -> None:
    model = small_model(torch.bfloat16)
    base = weights_of(model)
    bank = HotSwap(model)
    for seed, name in enumerate("ab"):
        bank.add(name, delta_of(model, seed=seed)[0])
    bank.activate("a")
    model[0].weight.detach().view(torch.int16).numpy()[:] = 7
    with pytest.raises(SwapError, match=r"Somebody wrote to 1 tensors while the delta `a` .* `0.weight`"):
        bank.activate("b")
    assert bank.active is None
    others = {name: weight for name, weight in weights_of(model).items() if name != "0.weight"}
    check_same(others, {name: base[name] for name in others})


def test_hot_swap_switched_by_many_threads_at_once_loses_nothing() -> None:
    model = small_model(torch.bfloat16)
    bank = HotSwap(model)
    expected = {}
    for seed, name in enumerate("abc"):
        delta, expected[name] = delta_of(model, seed=seed)
        bank.add(name, delta)
    base = weights_of(model)
    errors: list[BaseException] = []

    def switch(turn: int) -> None:
        try:
            for number in range(150):
                bank.activate("abc"[(turn + number) % 3])
                if number % 5 == 0:
                    bank.deactivate()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=switch, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    check_same(weights_of(model), base if bank.active is None else expected[bank.active])
    bank.deactivate()
    check_same(weights_of(model), base)


@pytest.mark.parametrize("first", ["a", "none"])
def test_hot_swap_takes_a_delta_without_changes(first: str) -> None:
    model = small_model(torch.bfloat16)
    base = weights_of(model)
    bank = HotSwap(model)
    delta, tuned = delta_of(model)
    bank.add("a", delta)
    bank.add("none", delta_of(model, density=0.0)[0])
    for name in (first, "a", "none", "a"):
        bank.activate(name)
        check_same(weights_of(model), tuned if name == "a" else base)
    assert bank.active == "a"
