"""`ValueModel`: starts as the policy's backbone with a head of zeros, and predicts from what stands before a token."""

from __future__ import annotations

import pytest
import torch
from helpers import random_mask, same_bits

from subnet_ft.checkpoints.tiny import FAMILIES, tiny_model
from subnet_ft.errors import TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.training.ppo import ValueModel, value_mask_like

IDS = torch.tensor([[0, 0, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16]])
ATTENTION = (IDS > 0).long()


def with_a_head(dtype: torch.dtype = torch.float32, seed: int = 0) -> ValueModel:
    found = ValueModel(tiny_model("llama", dtype=dtype))
    torch.nn.init.normal_(found.score.weight, generator=torch.Generator().manual_seed(seed))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_value_model_starts_at_zero_on_every_family(family: str) -> None:
    policy = tiny_model(family)
    found = ValueModel(policy)
    values = found(IDS, ATTENTION, 3)
    assert (values.shape, values.dtype) == ((2, 3), torch.float32)
    assert not values.any()
    weights = dict(policy.named_parameters())
    own = dict(found.named_parameters())
    assert own.keys() - weights.keys() == {"score.weight", "score.bias"}
    for name in own.keys() & weights.keys():
        assert same_bits(own[name].detach(), weights[name].detach())
        assert own[name].data_ptr() != weights[name].data_ptr()


def test_value_model_trains_everything_of_a_policy_that_is_masked() -> None:
    policy = tiny_model("llama")
    policy.model.layers[0].requires_grad_(False)
    assert all(parameter.requires_grad for parameter in ValueModel(policy).parameters())


def test_value_model_predicts_a_token_from_what_stands_before_it() -> None:
    found = with_a_head()
    before = found(IDS, ATTENTION, 3)
    for position, same in ((4, [True, False, False]), (5, [True, True, False]), (6, [True, True, True])):
        other = IDS.clone()
        other[:, position] = 20
        assert ((found(other, ATTENTION, 3) == before) == torch.tensor([same, same])).all()
    other = IDS.clone()
    other[:, 3] = 20
    assert (found(other, ATTENTION, 3) != before).all()


def test_value_model_computes_its_head_in_float32_under_autocast() -> None:
    found = with_a_head(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        values = found(IDS, ATTENTION, 3)
    assert values.dtype == torch.float32
    assert (values != values.bfloat16().float()).any()


def test_value_model_checkpoints_activations_only_where_a_gradient_is_wanted() -> None:
    plain, found = with_a_head(), with_a_head()
    found.checkpoint_activations()
    calls: list[bool] = []
    found.backbone.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with torch.no_grad():
        found(IDS, ATTENTION, 3)
    assert len(calls) == 1
    for model in (plain, found):
        model(IDS, ATTENTION, 3).square().sum().backward()
    assert len(calls) == 3
    for one, other in zip(plain.parameters(), found.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert same_bits(one.grad, other.grad)


def test_value_model_needs_a_backbone() -> None:
    policy = tiny_model("llama")
    with pytest.raises(TrainerError, match=r"`LlamaModel` names no backbone .* Pass `value_model=ValueModel"):
        ValueModel(policy.model)


def test_value_mask_like_keeps_the_policys_mask_and_trains_the_head() -> None:
    policy = tiny_model("llama")
    mask = random_mask(policy, 0.3)
    value_model = ValueModel(policy)
    found = value_mask_like(mask, value_model)
    found.check(value_model)
    for name in found.names:
        expected = torch.ones_like(found[name]) if name.startswith("score.") else mask[name]
        assert torch.equal(found[name], expected)


def test_value_mask_like_refuses_another_architecture() -> None:
    mask = SubnetMask.full({"gpt_neox.embed_in.weight": (3, 3)})
    with pytest.raises(TrainerError, match=r"The mask has no `model.embed_tokens.weight`, which the value model has"):
        value_mask_like(mask, ValueModel(tiny_model("llama")))
