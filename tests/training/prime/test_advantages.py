"""PRIME's arithmetic: the examples of its docstrings, and the paper's formulas written out as loops."""

from __future__ import annotations

import math

import pytest
import torch

from subnet_ft.training.prime.advantages import (
    discounted_sums,
    implicit_rewards,
    leave_one_out,
    outcome_loss,
    pair_accuracy,
    prime_advantages,
    within_accuracy,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""Sums of a few float32 numbers of about 1, in another order than the loops'."""

NAN = float("nan")


def floats(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def bits(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_implicit_rewards_is_its_example() -> None:
    rewards = implicit_rewards(floats([-1, -2, -9]), floats([-2, -1.5, 0]), bits([1, 1, 0]), beta=0.5)
    same(rewards, floats([0.5, -0.25, 0]))


def test_implicit_rewards_reads_nothing_outside_the_mask() -> None:
    log_probs = floats([-1.0, -math.inf, NAN]).requires_grad_()
    rewards = implicit_rewards(log_probs, floats([-2.0, -math.inf, 0.0]), bits([1, 0, 0]), beta=0.5)
    same(rewards, floats([0.5, 0, 0]))
    rewards.sum().backward()
    same(log_probs.grad, floats([0.5, 0, 0]))


def test_outcome_loss_is_its_example() -> None:
    losses = outcome_loss(floats([0.5, 0.5], [0, -2]), floats(1, 1))
    torch.testing.assert_close(losses, floats(0.3133, 2.1269), rtol=0, atol=5e-5)  # the example has four digits


def test_outcome_loss_falls_along_rewards_that_fit_and_takes_shares() -> None:
    rewards = torch.zeros(3, 2, requires_grad=True)
    losses = outcome_loss(rewards, floats(1, 0, 0.25))
    same(losses, torch.full((3,), math.log(2)))
    losses.sum().backward()
    same(rewards.grad, floats([-0.5, -0.5], [0.5, 0.5], [0.25, 0.25]))  # sigmoid(0) - outcome


def test_leave_one_out_is_its_example() -> None:
    same(leave_one_out(floats(1, 0, 0.5, 9), bits(1, 1, 1, 0), group_size=4), floats(0.25, 0.75, 0.5, 0.5))


def test_leave_one_out_keeps_groups_apart_and_does_without_others() -> None:
    values, is_scored = floats(1, 3, 10, NAN), bits(1, 1, 1, 0)
    same(leave_one_out(values, is_scored, group_size=2), floats(3, 1, 0, 10))


def test_discounted_sums_is_its_example() -> None:
    same(discounted_sums(floats([1, 2, 4]), gamma=0.5), floats([3, 4, 4]))


@pytest.mark.parametrize(("gamma", "expected"), [(0.0, [1, 2, 4]), (1.0, [7, 6, 4])])
def test_discounted_sums_at_the_ends_of_gamma(gamma: float, expected: list[float]) -> None:
    same(discounted_sums(floats([1, 2, 4]), gamma=gamma), floats(expected))


def test_prime_advantages_is_its_example() -> None:
    advantages = prime_advantages(
        floats([0.4, 0.2], [0.1, 0]),
        floats(1, 0),
        bits([1, 1], [1, 0]),
        bits(1, 1),
        group_size=2,
        gamma=0.5,
        outcome_coef=1.0,
        process_coef=1.0,
    )
    same(advantages, floats([1.35, 1.1], [-1.2, 0]))


def paper_advantages(
    rewards: list[list[float]], outcomes: list[float], *, gamma: float, outcome_coef: float, process_coef: float
) -> list[list[float]]:
    """Eq. 5 for one group of completions of any length, in Python's floats."""
    count = len(rewards)
    found = []
    for i, own in enumerate(rewards):
        others = [j for j in range(count) if j != i]
        baseline = sum(sum(rewards[j]) / len(rewards[j]) for j in others) / (count - 1)
        outcome = outcomes[i] - sum(outcomes[j] for j in others) / (count - 1)
        found.append(
            [
                process_coef * sum(gamma ** (s - t) * (own[s] - baseline) for s in range(t, len(own)))
                + outcome_coef * outcome
                for t in range(len(own))
            ]
        )
    return found


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(("outcome_coef", "process_coef"), [(1.0, 1.0), (5.0, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_prime_advantages_is_the_papers_formula(gamma: float, outcome_coef: float, process_coef: float) -> None:
    generator = torch.Generator().manual_seed(0)
    groups, size, length = 3, 4, 7
    rewards = torch.randn(groups * size, length, generator=generator)
    lengths = torch.randint(1, length + 1, (groups * size,), generator=generator)
    mask = torch.arange(length) < lengths.unsqueeze(1)
    rewards = torch.where(mask, rewards, 0.0)
    outcomes = torch.randint(0, 2, (groups * size,), generator=generator).float()
    coefficients = {"gamma": gamma, "outcome_coef": outcome_coef, "process_coef": process_coef}
    advantages = prime_advantages(
        rewards, outcomes, mask, torch.ones(groups * size, dtype=torch.bool), group_size=size, **coefficients
    )
    for start in range(0, groups * size, size):
        rows = range(start, start + size)
        ragged = [rewards[row, : lengths[row]].tolist() for row in rows]
        expected = paper_advantages(ragged, outcomes[start : start + size].tolist(), **coefficients)
        for row, values in zip(rows, expected, strict=True):
            same(advantages[row], floats([*values, *[0.0] * (length - len(values))])[0])


def test_prime_advantages_of_a_group_do_not_know_a_completion_that_is_not_scored() -> None:
    coefficients = {"gamma": 0.9, "outcome_coef": 1.0, "process_coef": 1.0}
    rewards, outcomes = floats([0.4, 0.2], [0.1, 0.3], [0, 0]), floats(1, 0, NAN)
    mask = bits([1, 1], [1, 1], [0, 0])
    three = prime_advantages(rewards, outcomes, mask, bits(1, 1, 0), group_size=3, **coefficients)
    two = prime_advantages(rewards[:2], outcomes[:2], mask[:2], bits(1, 1), group_size=2, **coefficients)
    same(three, torch.cat([two, torch.zeros(1, 2)]))


def test_prime_advantages_skips_tokens_that_a_tool_wrote() -> None:
    """A token outside the mask in the middle has neither advantage nor reward, but its place in the discount."""
    advantages = prime_advantages(
        floats([0.4, 0, 0.2], [0, 0, 0]),
        floats(0, 0),
        bits([1, 0, 1], [1, 1, 1]),
        bits(1, 1),
        group_size=2,
        gamma=0.5,
        outcome_coef=1.0,
        process_coef=1.0,
    )
    same(advantages[0], floats(0.4 + 0.25 * 0.2, 0, 0.2))
    same(advantages[1], -0.3 * floats(1.75, 1.5, 1))


def test_within_accuracy_is_its_example() -> None:
    kept = within_accuracy(floats(1, 1, 1, 0), bits(1, 1, 1, 1), group_size=2, low=0.2, high=0.8)
    assert kept.tolist() == [False, False, True, True]


@pytest.mark.parametrize("right", range(11))
def test_within_accuracy_includes_its_bounds(right: int) -> None:
    outcomes = floats(*[1] * right, *[0] * (10 - right))
    for low, high in ((0.2, 0.8), (0.1, 0.7), (0.3, 0.9), (0.0, 1.0)):
        kept = within_accuracy(outcomes, torch.ones(10, dtype=torch.bool), group_size=10, low=low, high=high)
        assert kept.tolist() == [round(low * 10) <= right <= round(high * 10)] * 10


def test_within_accuracy_counts_scored_completions_only_and_wants_two() -> None:
    outcomes = floats(1, 0, NAN, 1, NAN, NAN)
    kept = within_accuracy(outcomes, ~outcomes.isnan(), group_size=3, low=0.5, high=1.0)
    assert kept.tolist() == [True, True, False, False, False, False]


def test_pair_accuracy_is_its_example() -> None:
    outcomes, everyone = floats(1, 0, 0), bits(1, 1, 1)
    assert pair_accuracy(floats(0.3, 0.1, 0.2), outcomes, everyone, group_size=3) == 1
    assert pair_accuracy(floats(0.1, 0.1, 0.2), outcomes, everyone, group_size=3) == 0.25


def test_pair_accuracy_compares_within_a_prompt_and_scored_completions_only() -> None:
    scores, outcomes = floats(9, 8, 1, 2), floats(0, 1, 1, 0)
    assert pair_accuracy(scores, outcomes, bits(1, 1, 1, 1), group_size=2) == 0
    assert math.isnan(pair_accuracy(scores, outcomes, bits(1, 0, 1, 0), group_size=2))
