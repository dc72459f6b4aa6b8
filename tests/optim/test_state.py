"""Saving and loading the state of MaskedAdamW."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits, set_gradients, small_model
from torch._subclasses.fake_tensor import FakeTensorMode

from subnet_ft.errors import OptimizerStateError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW


@pytest.mark.parametrize("master", ["fp32", "remainder"])
def test_masked_adamw_resumes_to_the_same_bits(master: str, tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, MaskedAdamW]:
        model = small_model(torch.bfloat16)
        mask = random_mask(model, 0.4)
        return model, MaskedAdamW(model.named_parameters(), mask, lr=1e-3, max_grad_norm=1.0, master=master)

    model, optimizer = build()
    for step in range(5):
        set_gradients(model, step)
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    for step in range(5, 10):
        set_gradients(model, step)
        optimizer.step()

    resumed, resumed_optimizer = build()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    for step in range(5, 10):
        set_gradients(resumed, step)
        resumed_optimizer.step()
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert same_bits(a.detach(), b.detach())


def test_masked_adamw_refuses_the_state_of_another_mask() -> None:
    model = small_model(torch.float32)
    saved = MaskedAdamW(model.named_parameters(), random_mask(model, 0.4), max_grad_norm=None).state_dict()
    other = MaskedAdamW(model.named_parameters(), random_mask(model, 0.4, seed=2), max_grad_norm=None)
    with pytest.raises(OptimizerStateError, match="belongs to mask"):
        other.load_state_dict(saved)


def saved_after_a_step(dtype: torch.dtype, master: str) -> tuple[MaskedAdamW, dict[str, Any]]:
    model = small_model(dtype)
    optimizer = MaskedAdamW(model.named_parameters(), random_mask(model, 0.4), max_grad_norm=None, master=master)
    set_gradients(model, 0)
    optimizer.step()
    return optimizer, optimizer.state_dict()


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.pop(key)


@pytest.mark.parametrize(
    ("dtype", "master", "damage", "message"),
    [
        (torch.bfloat16, "fp32", drop("master"), r"`2\.weight` .*`master` is missing"),
        (torch.bfloat16, "fp32", drop("exp_avg_sq"), r"`2\.weight` .*`exp_avg_sq` is missing"),
        (torch.bfloat16, "fp32", drop("step"), r"`2\.weight` .*`step` is missing"),
        (torch.bfloat16, "fp32", dict.clear, r"`step` is missing, `exp_avg` is missing"),
        (torch.float32, "fp32", lambda v: v.update(master=v["exp_avg"]), r"`2\.weight` .*`master` is not known"),
        (torch.float32, "fp32", lambda v: v.update(max_exp_avg_sq=v["exp_avg"]), "`max_exp_avg_sq` is not known"),
        (torch.bfloat16, "fp32", lambda v: v.update(master=v["master"].short()), "is torch.int16, expected torch.floa"),
        (torch.bfloat16, "remainder", lambda v: v.update(master=v["master"].float()), "is torch.float32, expected tor"),
        (torch.float16, "remainder", lambda v: v.update(master=v["master"].short()), "is torch.int16, expected torch"),
        (torch.bfloat16, "fp32", lambda v: v.update(exp_avg=v["exp_avg"][1:]), r"`exp_avg` of `2\.weight` has shape"),
        (torch.bfloat16, "fp32", lambda v: v.update(step=torch.ones(1)), r"`step` of `2\.weight` has shape \(1,\)"),
        (torch.bfloat16, "fp32", lambda v: v.update(step=1), r"`step` of `2\.weight` is int, expected torch.float32"),
    ],
)
def test_masked_adamw_refuses_a_state_with_other_entries(
    dtype: torch.dtype, master: str, damage: Callable[[dict[str, Any]], object], message: str
) -> None:
    optimizer, saved = saved_after_a_step(dtype, master)
    damage(saved["state"]["2.weight"])
    before = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    with pytest.raises(OptimizerStateError, match=message):
        optimizer.load_state_dict(saved)
    assert all(optimizer.state[p][key] is value for p, values in before.items() for key, value in values.items())


def test_masked_adamw_refuses_a_state_of_a_tensor_that_it_does_not_train() -> None:
    model = small_model(torch.float32)
    dense = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    dense["2.weight"][0, 0] = True
    optimizer = MaskedAdamW(model.named_parameters(), SubnetMask.from_dense(dense), max_grad_norm=None)
    saved = optimizer.state_dict()
    empty = {"step": torch.tensor(1.0), "exp_avg": torch.empty(0), "exp_avg_sq": torch.empty(0)}
    with pytest.raises(OptimizerStateError, match=r"`2\.bias`, which this optimizer does not train"):
        optimizer.load_state_dict({**saved, "state": {"2.bias": empty}})


def test_masked_adamw_loads_its_own_state_after_somebody_looked_into_it() -> None:
    model = small_model(torch.float32)
    optimizer = MaskedAdamW(model.named_parameters(), random_mask(model, 0.4), max_grad_norm=None)
    assert optimizer.state[next(model.parameters())] == {}
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["state"] == {}


def test_masked_adamw_loads_the_step_count_to_the_host() -> None:
    optimizer, saved = saved_after_a_step(torch.bfloat16, "fp32")
    with FakeTensorMode():  # a tensor that says it lives on a GPU, where there is none
        saved["state"]["2.weight"]["step"] = torch.zeros((), device="cuda")
    optimizer.load_state_dict(saved)
    assert {values["step"].device.type for values in optimizer.state.values()} == {"cpu"}
