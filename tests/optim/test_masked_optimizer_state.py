"""Saving and loading the state of MaskedOptimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits, set_gradients, small_model
from wrapped_optimizers import WRAPPED, Counting, EightBit, Lion

from subnet_ft.errors import OptimizerStateError
from subnet_ft.optim import MaskedAdamW, MaskedOptimizer


def build(
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1,
    **options: Any,
) -> tuple[torch.nn.Module, MaskedOptimizer]:
    model = small_model(dtype)
    mask = random_mask(model, 0.4, seed=seed)
    return model, MaskedOptimizer(
        optimizer_cls, model.named_parameters(), mask, max_grad_norm=1.0, **{"lr": 1e-2, **options}
    )


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()


def everything(model: torch.nn.Module, optimizer: MaskedOptimizer) -> dict[str, torch.Tensor]:
    """Return weights and state by name, as tensors."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, entries in optimizer.state_dict()["state"].items():
        found.update({f"{name}/{key}": torch.as_tensor(v) for key, v in entries.items() if not isinstance(v, str)})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize(("optimizer_cls", "options"), [*WRAPPED, (EightBit, {}), (Counting, {})])
def test_masked_optimizer_resumes_to_the_same_bits(
    optimizer_cls: type[torch.optim.Optimizer],
    options: dict[str, Any],
    is_used: bool,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    model, optimizer = build(optimizer_cls, dtype, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, optimizer, range(7))
    schedule.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, range(7, 12))

    resumed, resumed_optimizer = build(optimizer_cls, dtype, **options)
    if is_used:
        train(resumed, resumed_optimizer, range(100, 103))
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    train(resumed, resumed_optimizer, range(7, 12))
    expected, found = everything(model, optimizer), everything(resumed, resumed_optimizer)
    assert list(found) == list(expected)
    assert [key for key in expected if not same_bits(found[key], expected[key])] == []
    assert resumed_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_masked_optimizer_saves_master_and_entries_by_name() -> None:
    model, optimizer = build(torch.optim.NAdam)
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    for name, entries in saved["state"].items():
        compact = (optimizer.mask.tensors[name].count,)
        assert {key: tuple(value.shape) for key, value in entries.items()} == {
            "master": compact,
            "exp_avg": compact,
            "exp_avg_sq": compact,
            "step": (),
            "mu_product": (),
        }
        assert {value.dtype for value in entries.values()} == {torch.float32}
        assert type(entries["master"]) is torch.Tensor
    group = saved["param_groups"][0]
    assert group["mask_fingerprint"] == optimizer.mask.fingerprint
    assert group["optimizer_class"] == "NAdam"
    assert group["compact_entries"] == ["exp_avg", "exp_avg_sq", "master"]


def test_masked_optimizer_copies_what_it_loads() -> None:
    model, optimizer = build()
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    before = {key: value.clone() for key, value in saved["state"]["2.weight"].items()}
    other, resumed = build()
    resumed.load_state_dict(saved)
    assert resumed.memory()["masters"] == 4 * resumed.mask.num_trainable
    train(other, resumed, range(2, 4))
    assert all(same_bits(saved["state"]["2.weight"][key], value) for key, value in before.items())


def test_masked_optimizer_leaves_a_tensor_without_saved_state_at_its_beginning() -> None:
    model, optimizer = build(torch.optim.Adagrad, initial_accumulator_value=0.5)
    saved = optimizer.state_dict()
    assert saved["state"] == {}
    train(model, optimizer, range(3))
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["state"] == {}
    other, untouched = build(torch.optim.Adagrad, initial_accumulator_value=0.5)
    other.load_state_dict(model.state_dict())
    train(model, optimizer, range(3, 5))
    train(other, untouched, range(3, 5))
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("master"), r"`2\.weight` .*`master` is missing"),
        (drop("exp_avg_sq"), r"`2\.weight` .*`exp_avg_sq` is missing"),
        (
            lambda v: v.update(master=v["master"].bfloat16()),
            r"`master` of `2\.weight` is torch\.bfloat16, expected tor",
        ),
        (lambda v: v.update(master=v["master"][1:]), r"`master` of `2\.weight` has shape"),
        (lambda v: v.update(exp_avg=v["exp_avg"][1:]), r"`exp_avg` of `2\.weight` has shape"),
        (lambda v: v.update(exp_avg=v["exp_avg"].tolist()), r"`exp_avg` of `2\.weight` is list"),
    ],
)
def test_masked_optimizer_refuses_a_damaged_state(damage: Callable[[dict[str, Any]], object], message: str) -> None:
    model, optimizer = build()
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    damage(saved["state"]["2.weight"])
    before = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    with pytest.raises(OptimizerStateError, match=message):
        optimizer.load_state_dict(saved)
    assert all(optimizer.state[p][key] is value for p, values in before.items() for key, value in values.items())


def test_masked_optimizer_refuses_the_state_of_another_mask_or_optimizer() -> None:
    _, optimizer = build()
    with pytest.raises(OptimizerStateError, match="belongs to mask"):
        optimizer.load_state_dict(build(seed=2)[1].state_dict())
    with pytest.raises(OptimizerStateError, match="is that of MaskedOptimizer around `Lion`, this optimizer is Masked"):
        optimizer.load_state_dict(build(Lion)[1].state_dict())
    model = small_model(torch.bfloat16)
    fused = MaskedAdamW(model.named_parameters(), random_mask(model, 0.4), max_grad_norm=None)
    with pytest.raises(OptimizerStateError, match="is that of MaskedAdamW or MaskedSGD, this optimizer is MaskedOpti"):
        optimizer.load_state_dict(fused.state_dict())
    with pytest.raises(
        OptimizerStateError, match="is that of MaskedOptimizer around `AdamW`, this optimizer is Masked"
    ):
        fused.load_state_dict(optimizer.state_dict())


class Eager(torch.optim.SGD):
    """Fills its state when it is built, and fails on a negative momentum after its step."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            self.state[parameter]["count"] = 10

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    entries = self.state[parameter]
                    entries["count"] = entries.get("count", 0) + 1
        if self.param_groups[0]["momentum"] < 0:
            raise ArithmeticError("negative momentum")


class Late(Eager):
    """Counts from zero, for its state is empty at first."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.state.clear()


def names(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("empty", ["clear", "empty entries"])
@pytest.mark.parametrize(("optimizer_cls", "options"), [*WRAPPED, (EightBit, {}), (Counting, {}), (Eager, {})])
def test_masked_optimizer_starts_anew_where_the_state_was_cleared(
    optimizer_cls: type[torch.optim.Optimizer], options: dict[str, Any], empty: str
) -> None:
    model, optimizer = build(optimizer_cls, **options)
    train(model, optimizer, range(5))
    if empty == "clear":
        optimizer.state.clear()
    else:
        for entries in optimizer.state.values():
            entries.clear()
    assert optimizer.memory()["moments"] == optimizer.memory()["masters"] == 0
    other, fresh = build(optimizer_cls, **options)
    other.load_state_dict(model.state_dict())
    train(model, optimizer, range(5, 7))
    train(other, fresh, range(5, 7))
    expected, found = everything(other, fresh), everything(model, optimizer)
    assert list(found) == list(expected)
    assert [key for key in expected if not same_bits(found[key], expected[key])] == []


def test_masked_optimizer_starts_one_tensor_anew_and_goes_on_with_the_rest() -> None:
    model, optimizer = build(torch.optim.Adagrad, initial_accumulator_value=0.5)
    train(model, optimizer, range(5))
    del optimizer.state[model[2].weight]
    train(model, optimizer, range(5, 6))
    saved = optimizer.state_dict()["state"]
    assert {name: int(saved[name]["step"]) for name in saved} == {n: 1 if n == "2.weight" else 6 for n in names(model)}


@pytest.mark.parametrize(("optimizer_cls", "start"), [(Eager, 10), (Late, 0)])
def test_masked_optimizer_takes_nothing_over_from_a_step_that_failed(optimizer_cls: type[Eager], start: int) -> None:
    model, optimizer = build(optimizer_cls)
    group = optimizer.param_groups[0]
    for steps, count in ((range(1), 1), (range(1, 3), 3)):
        group["momentum"] = -0.5
        with pytest.raises(ArithmeticError):
            train(model, optimizer, steps[:1])
        optimizer.zero_grad()
        group["momentum"] = 0.0
        train(model, optimizer, steps)
        assert {entries["count"] for entries in optimizer.state.values()} == {start + count}


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step", "master"])
@pytest.mark.parametrize("in_place", [False, True])
def test_masked_optimizer_goes_on_from_the_entries_that_somebody_put_in_place(key: str, in_place: bool) -> None:
    model, optimizer = build()
    train(model, optimizer, range(3))
    other, expected = build()
    other.load_state_dict(model.state_dict())
    saved = optimizer.state_dict()
    new = saved["state"]["2.weight"][key] * 0.5
    saved["state"]["2.weight"][key] = new
    expected.load_state_dict(saved)
    entries = optimizer.state[model[2].weight]
    if in_place:
        entries[key].copy_(new)
    else:
        entries[key] = new.clone()
    train(model, optimizer, range(3, 5))
    train(other, expected, range(3, 5))
    assert all(
        same_bits(value, everything(other, expected)[name]) for name, value in everything(model, optimizer).items()
    )


@pytest.mark.parametrize("key", ["exp_avg", "master"])
def test_masked_optimizer_holds_no_tensor_that_was_replaced(key: str) -> None:
    model, optimizer = build()
    train(model, optimizer, range(2))
    entries = optimizer.state[model[2].weight]
    old = weakref.ref(entries[key].untyped_storage())
    entries[key] = entries[key].clone()
    assert old() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("master"),
            r"`master` of `2\.weight` in the optimizer's `state` is NoneType, expected contiguous torch\.f",
        ),
        (lambda v: v.update(master=v["master"].bfloat16()), r"`2\.weight` .* is torch\.bfloat16 .*, expected contig"),
        (lambda v: v.update(master=v["master"][1:]), r"`2\.weight` .* is torch\.float32 .*, expected contiguous"),
    ],
)
def test_masked_optimizer_refuses_a_master_that_does_not_fit_before_it_changes_anything(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    model, optimizer = build()
    train(model, optimizer, range(2))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = int(optimizer.state[model[0].weight]["step"])
    change(optimizer.state[model[2].weight])
    with pytest.raises(OptimizerStateError, match=message):
        train(model, optimizer, range(2, 3))
    assert int(optimizer.state[model[0].weight]["step"]) == step
    assert all(same_bits(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True))
