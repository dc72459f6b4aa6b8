"""The base under an adapter is the base bit by bit, switched to or copied, whatever the adapter is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import same_bits
from training.adapted import KINDS, adapted

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import TrainerError
from subnet_ft.methods.adapters import adapter_parameters
from subnet_ft.training.base_of import BaseOf, adapter_off, base_of

INPUTS = {
    "input_ids": torch.tensor([[0, 0, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]),
}


def moved(kind: str) -> Any:
    """Return a model with an adapter that computes something else than its base, in training mode."""
    return adapted(kind, dtype=torch.bfloat16, distance=1.0).train()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**INPUTS).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_off_gives_the_base_and_then_the_adapter_again(kind: str) -> None:
    model = moved(kind)
    still = next(iter(adapter_parameters(model).values())).requires_grad_(False)
    before, flags = logits_of(model), {name: p.requires_grad for name, p in model.named_parameters()}
    with adapter_off(model):
        assert not any(module.training for module in model.get_base_model().modules())
        assert same_bits(logits_of(model), logits_of(tiny_model("llama")))
    assert same_bits(logits_of(model), before)
    assert before.shape != INPUTS["input_ids"].shape
    assert not same_bits(before[:, -7:], logits_of(tiny_model("llama")))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not still.requires_grad
    assert model.training


@pytest.mark.parametrize("kind", KINDS)
def test_base_of_is_called_like_the_base_and_leaves_no_graph(kind: str) -> None:
    found = BaseOf(moved(kind))(**INPUTS).logits
    assert same_bits(found, logits_of(tiny_model("llama")))
    assert not found.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_base_of_copies_the_base_as_if_there_were_no_adapter(kind: str) -> None:
    model, plain = moved(kind), tiny_model("llama")
    before = logits_of(model)
    model.get_base_model().forward = lambda **inputs: pytest.fail("the copy computed with the policy")
    found = base_of(model)
    del model.get_base_model().forward
    assert type(found) is type(plain)
    weights = dict(found.named_parameters())
    assert list(weights) == [name for name, _ in plain.named_parameters()]
    for name, weight in plain.named_parameters():
        assert same_bits(weights[name].detach(), weight.detach()), name
        assert weights[name].requires_grad
    assert same_bits(logits_of(found), logits_of(plain))
    with torch.no_grad():
        for weight in weights.values():
            weight.zero_()
    assert same_bits(logits_of(model), before)


def test_base_of_refuses_a_quantized_base() -> None:
    model = moved("lora")
    model.get_base_model().is_quantized = True
    with pytest.raises(TrainerError, match=r"base is quantized.*`value_model` for PPO, `reward_model` for PRIME"):
        base_of(model)
