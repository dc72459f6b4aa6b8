"""The arithmetic of PPO: the examples of its docstrings, then what each function must not read or change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subnet_ft.training.ppo.functions import (
    aggregate,
    explained_variance,
    gae,
    last_tokens,
    masked_mean,
    per_token_rewards,
    value_loss,
    whiten,
)

NAN = float("nan")


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_last_tokens_example() -> None:
    found = last_tokens(torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]))
    assert found.tolist() == [[False, False, True, False], [False] * 4]


def test_per_token_rewards_example() -> None:
    found = per_token_rewards(torch.tensor([2.0]), rows([0.2, -0.4, 9]), torch.tensor([[1, 1, 0]]), kl_coef=0.5)
    torch.testing.assert_close(found, rows([-0.1, 2.2, 0]))


def test_per_token_rewards_without_a_reference_are_the_scores() -> None:
    found = per_token_rewards(torch.tensor([2.0, NAN]), None, torch.tensor([[1, 1, 0], [0, 0, 0]]), kl_coef=0.5)
    assert found.tolist() == [[0, 2, 0], [0, 0, 0]]


def test_gae_example() -> None:
    advantages, returns = gae(rows([0, 1, 9]), rows([0.5, 0.25, 7]), torch.tensor([[1, 1, 0]]), gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[0.125, 0.75, 0]]
    assert returns.tolist() == [[0.625, 1, 0]]


def test_gae_of_a_long_completion_with_a_discount() -> None:
    """By hand: differences 1 + 0.5 * 2 - 1 = 1, 0 + 0.5 * 4 - 2 = 0, 3 - 4 = -1; decay 0.5 * 0.5."""
    advantages, returns = gae(rows([1, 0, 3]), rows([1, 2, 4]), torch.ones(1, 3), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1 - 0.0625, -0.25, -1]]
    assert returns.tolist() == [[1.9375, 1.75, 3]]


def test_gae_passes_over_what_a_tool_said() -> None:
    with_tool = gae(rows([0.5, 9, 9, 1]), rows([1, 9, 9, 2]), torch.tensor([[1, 0, 0, 1]]), gamma=0.9, lam=0.8)
    without = gae(rows([0.5, 1]), rows([1, 2]), torch.ones(1, 2), gamma=0.9, lam=0.8)
    for found, expected in zip(with_tool, without, strict=True):
        assert found[0, [0, 3]].tolist() == expected[0].tolist()
        assert found[0, 1:3].tolist() == [0, 0]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_gae_with_lambda_one_takes_returns_as_they_came_and_with_zero_one_step(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 3, length, generator=generator, dtype=torch.float64)
    ends = torch.randint(1, length + 1, (3, 1), generator=generator)
    mask = torch.arange(length) < ends
    _, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for row in range(3):
        for t in range(int(ends[row])):
            tail = rewards[row, t : int(ends[row])]
            expected = sum(0.9**step * float(reward) for step, reward in enumerate(tail))
            assert float(returns[row, t]) == pytest.approx(expected, abs=1e-9)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    behind = torch.where(mask, values, 0.0)[:, 1:]
    expected = rewards - values + 0.9 * torch.nn.functional.pad(behind, (0, 1))
    torch.testing.assert_close(advantages, torch.where(mask, expected, 0.0))


def test_whiten_example() -> None:
    found = whiten(rows([1, 3], [5, 100]), torch.tensor([[1, 1], [1, 0]]))
    torch.testing.assert_close(found, rows([-(1.5**0.5), 0], [1.5**0.5, 0]))


@pytest.mark.parametrize("mask", [[[1, 1], [1, 0]], [[0, 0], [1, 0]], [[0, 0], [0, 0]]])
def test_whiten_makes_equal_advantages_zero(mask: list[list[int]]) -> None:
    found = whiten(rows([4, 4], [4, NAN]), torch.tensor(mask))
    assert found.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(("wanted", "loss", "is_clipped"), [(2.0, 0.78125, True), (0.0, 0.5, False)])
def test_value_loss_example(wanted: float, loss: float, is_clipped: bool) -> None:
    found = value_loss(rows([1]), rows([0.5]), rows([wanted]), cliprange=0.25)
    assert [part.item() for part in found] == [loss, is_clipped]


def test_value_loss_stops_pulling_a_value_that_moved_far_enough_towards_its_return() -> None:
    values = rows([1.0, 1.0, 0.6]).requires_grad_()
    loss, is_clipped = value_loss(values, rows([0.5, 0.5, 0.5]), rows([2, 0, 2]), cliprange=0.25)
    loss.sum().backward()
    assert is_clipped.tolist() == [[True, False, False]]
    assert values.grad is not None
    torch.testing.assert_close(values.grad, rows([0, 1, -1.4]))


def test_value_loss_without_a_range_is_half_the_squared_error() -> None:
    loss, is_clipped = value_loss(rows([1, 5]), rows([0, 0]), rows([2, 3]), cliprange=None)
    assert loss.tolist() == [[0.5, 2]]
    assert not is_clipped.any()


@pytest.mark.parametrize(("loss_type", "expected"), [("grpo", 3.5), ("bnpo", 3.0), ("dr_grpo", 1.125), ("dapo", 3.0)])
def test_aggregate_example(loss_type: str, expected: float) -> None:
    per_token, mask = rows([1, 3], [5, 100]), torch.tensor([[1, 1], [1, 0]])
    options = {"loss_type": loss_type, "num_items": 3, "max_completion_length": 4}
    assert float(aggregate(per_token, mask, num_micro_batches=1, **options)) == expected
    half = expected if loss_type == "dapo" else expected / 2
    assert float(aggregate(per_token, mask, num_micro_batches=2, **options)) == half


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_aggregate_of_nothing_is_zero(loss_type: str) -> None:
    found = aggregate(
        rows([NAN, 3]),
        torch.zeros(1, 2),
        loss_type=loss_type,
        num_micro_batches=1,
        num_items=torch.tensor(1.0),
        max_completion_length=2,
    )
    assert float(found) == 0


def test_explained_variance_example() -> None:
    found = explained_variance(rows([1, 2, 9]), rows([1, 4, 9]), torch.tensor([[1, 1, 0]]))
    assert found == pytest.approx(1 - 1 / 2.25)


def test_explained_variance_is_one_for_perfect_values_and_zero_for_a_constant() -> None:
    returns, mask = rows([1, 4, 9]), torch.ones(1, 3)
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(rows([7, 7, 7]), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, rows([2, 2, 2]), mask))
    assert math.isnan(explained_variance(returns, returns, torch.zeros(1, 3)))


def test_masked_mean_of_nothing_is_nan() -> None:
    assert masked_mean(rows([1, 3, NAN]), torch.tensor([[1, 1, 0]])) == 2
    assert math.isnan(masked_mean(rows([1]), torch.zeros(1, 1)))


def test_nothing_behind_the_mask_is_read() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    clean = [torch.randn(2, 4, generator=generator) for _ in range(3)]
    spoiled = [torch.where(mask.bool(), part, NAN) for part in clean]
    scores = torch.tensor([1.0, -1.0])
    for one, other in zip(_all(scores, *clean, mask), _all(scores, *spoiled, mask), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def _all(
    scores: torch.Tensor, kl: torch.Tensor, values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor
) -> list[torch.Tensor]:
    rewards = per_token_rewards(scores, kl, mask, kl_coef=0.1)
    return [
        rewards,
        *gae(torch.where(mask.bool(), rewards, values), values, mask, gamma=0.9, lam=0.9),
        whiten(values, mask),
        aggregate(values, mask, loss_type="bnpo", num_micro_batches=1, num_items=1, max_completion_length=4),
        torch.tensor(explained_variance(values, returns, mask)),
        torch.tensor(masked_mean(values, mask)),
    ]
