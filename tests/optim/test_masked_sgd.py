"""MaskedSGD against `torch.optim.SGD`, and its promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits, set_gradients, small_model, ulps_at_scale

from subnet_ft.optim import MaskedSGD

VARIANTS: list[dict[str, Any]] = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "weight_decay": 0.1},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_sgd_equals_sgd_on_fp32_masters(variant: dict[str, Any], dtype: torch.dtype) -> None:
    model, reference = small_model(dtype), small_model(torch.float32)
    mask = random_mask(model, 0.4)
    for theirs, ours in zip(reference.parameters(), model.parameters(), strict=True):
        theirs.data.copy_(ours.data.float())
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ours = MaskedSGD(model.named_parameters(), mask, lr=1e-2, max_grad_norm=None, **variant)
    theirs = torch.optim.SGD(reference.parameters(), lr=1e-2, foreach=False, **variant)
    for step in range(20):
        set_gradients(model, step)
        for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            other.grad = parameter.grad.float() * mask[name]
        ours.step()
        theirs.step()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        chosen = mask[name]
        master = ours.state[parameter].get("master", parameter.detach()[chosen])
        assert ulps_at_scale(master, other.detach()[chosen], scale=0.05) <= 20 * 4
        assert same_bits(parameter.detach()[~chosen], start[name][~chosen])
        assert (parameter.detach()[chosen] != start[name][chosen]).float().mean() > 0.5


def test_masked_sgd_without_momentum_keeps_only_masters() -> None:
    model = small_model(torch.bfloat16)
    optimizer = MaskedSGD(model.named_parameters(), random_mask(model, 0.4), lr=0.1, max_grad_norm=None)
    set_gradients(model, 0)
    optimizer.step()
    assert {key for values in optimizer.state.values() for key in values} == {"step", "master"}
    assert optimizer.memory()["moments"] == 0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_masked_sgd_resumes_to_the_same_bits(variant: dict[str, Any], tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, MaskedSGD]:
        model = small_model(torch.bfloat16)
        return model, MaskedSGD(
            model.named_parameters(), random_mask(model, 0.4), lr=1e-2, max_grad_norm=1.0, master="remainder", **variant
        )

    model, optimizer = build()
    for step in range(8):
        if step == 4:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        set_gradients(model, step)
        optimizer.step()
    resumed, resumed_optimizer = build()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    for step in range(4, 8):
        set_gradients(resumed, step)
        resumed_optimizer.step()
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr` must be >= 0"),
        ({"momentum": 1.0}, "`momentum` must lie"),
        ({"weight_decay": -0.1}, "`weight_decay` must be >= 0"),
        ({"nesterov": True}, "`nesterov` needs a `momentum`"),
        ({"master": "bf16"}, "`master` must be one of"),
    ],
)
def test_masked_sgd_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    model = small_model(torch.float32)
    with pytest.raises(ValueError, match=message):
        MaskedSGD(model.named_parameters(), random_mask(model, 0.4), **{"lr": 0.1, "max_grad_norm": None, **options})
