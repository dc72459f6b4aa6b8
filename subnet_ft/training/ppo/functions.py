"""The arithmetic of PPO: tensors in, tensors out. B completions of T token positions each.

A `mask` (B, T) is 1 at tokens that the policy chose and that count, and 0 at padding, at what a tool said, and in
completions without a reward. What stands where it is 0, NaN included, is never read.
"""

from __future__ import annotations

import torch


def last_tokens(mask: torch.Tensor) -> torch.Tensor:
    """Mark the last token that counts of every completion; a completion without one has no mark.

    Args:
        mask: (B, T) bool or integer. In.

    Returns:
        (B, T) bool.

    Example:
        `[[1, 0, 1, 0], [0, 0, 0, 0]]` gives `[[0, 0, 1, 0], [0, 0, 0, 0]]`.
    """
    valid = mask.bool()
    remaining = valid.long().flip(1).cumsum(1).flip(1)
    return valid & (remaining == 1)


def per_token_rewards(
    scores: torch.Tensor, kl: torch.Tensor | None, mask: torch.Tensor, *, kl_coef: float
) -> torch.Tensor:
    """Pay every token its KL penalty, and the last one the score of the completion.

    Args:
        scores: (B,) float32, one per completion. In.
        kl: (B, T) float32, log-probability under the policy minus that under the reference, of which the mean over
            what the policy samples is the KL divergence. In; `None` stands for zeros.
        mask: (B, T). In.
        kl_coef: Price of one nat, >= 0.

    Returns:
        (B, T) float32, 0 where the mask is 0.

    Example:
        Score 2, kl `[0.2, -0.4, 9]`, mask `[1, 1, 0]`, `kl_coef` 0.5: `[-0.1, 2.2, 0]`.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2.
    """
    rewards = torch.where(last_tokens(mask), scores.unsqueeze(1), 0.0)
    if kl is None:
        return rewards
    return torch.where(mask.bool(), rewards - kl_coef * kl, 0.0)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the advantage of every token, and the return that its value should have predicted.

    A completion ends with its last token: the value behind it is 0. Tokens that do not count are passed over, as if the
    policy had chosen the next one right after the one before.

    Args:
        rewards: (B, T) float32. In.
        values: (B, T) float32, each the value of what stands before its token. In.
        mask: (B, T). In.
        gamma: Discount from one token to the next, in [0, 1].
        lam: Decay of the differences that are added up, in [0, 1]; 1 takes returns as they came.

    Returns:
        Advantages and returns, (B, T) float32 each, 0 where the mask is 0.

    Example:
        Rewards `[0, 1, 9]`, values `[0.5, 0.25, 7]`, mask `[1, 1, 0]`, `gamma` 1, `lam` 0.5: the differences are
        `[-0.25, 0.75]`, the advantages `[0.125, 0.75, 0]` and the returns `[0.625, 1, 0]`.

    Source: Schulman et al. 2015 (arXiv 1506.02438), equations 11 and 16.
    """
    valid = mask.bool()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(values.size(0))
    for t in reversed(range(values.size(1))):
        difference = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = difference + gamma * lam * next_advantage
        advantages[:, t] = torch.where(valid[:, t], advantage, 0.0)
        next_advantage = torch.where(valid[:, t], advantage, next_advantage)
        next_value = torch.where(valid[:, t], values[:, t], next_value)
    return advantages, torch.where(valid, advantages + values, 0.0)


def whiten(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shift and scale to mean 0 and variance 1 over the tokens that count.

    Args:
        advantages: (B, T) float32. In.
        mask: (B, T). In.

    Returns:
        (B, T) float32, 0 where the mask is 0; equal advantages all become 0.

    Example:
        `[[1, 3], [5, 100]]` with mask `[[1, 1], [1, 0]]`: mean 3, variance 8/3, so `[[-1.2247, 0], [1.2247, 0]]`.
    """
    valid = mask.bool()
    chosen = advantages[valid]
    if chosen.numel() == 0:
        return torch.zeros_like(advantages)
    variance, mean = torch.var_mean(chosen, correction=0)
    return torch.where(valid, (advantages - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, cliprange: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return half the squared error of every value, or of the value clipped around the old one, whichever is larger.

    Args:
        values: (B, T) float32, of the value model as it is now. In, differentiated.
        old_values: (B, T) float32, of the value model when the completions were sampled. In.
        returns: (B, T) float32. In.
        cliprange: How far a value may move from the old one before it stops being pulled, > 0; `None`: any distance.

    Returns:
        The loss (B, T) float32, and (B, T) bool: where the clipped error was the larger one.

    Example:
        Value 1, old value 0.5, `cliprange` 0.25, so the clipped value is 0.75. Return 2: the clipped error is larger,
        `0.5 * 1.25**2 = 0.78125`. Return 0: it is not, `0.5 * 1**2 = 0.5`.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 9; clipped like the ratio of equation 7.
    """
    error = (values - returns).square()
    if cliprange is None:
        return 0.5 * error, torch.zeros_like(error, dtype=torch.bool)
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    clipped_error = (clipped - returns).square()
    return 0.5 * torch.maximum(error, clipped_error), clipped_error > error


def aggregate(
    per_token: torch.Tensor,
    mask: torch.Tensor,
    *,
    loss_type: str,
    num_micro_batches: int,
    num_items: torch.Tensor | float,
    max_completion_length: int,
) -> torch.Tensor:
    """Sum up a loss per token as GRPO sums up that of its policy, so that micro-batches add up to one step.

    Args:
        per_token: (B, T) float32. In, differentiated.
        mask: (B, T), GRPO's own. In.
        loss_type: `grpo` (mean over completions of their means), `bnpo` (mean over tokens), `dr_grpo` (by the longest
            possible completion) or `dapo` (by the tokens of the whole step).
        num_micro_batches: How many of them add up to a step.
        num_items: Tokens that count in the whole step; only `dapo` looks at it.
        max_completion_length: Only `dr_grpo` looks at it.

    Returns:
        () float32.

    Example:
        `[[1, 3], [5, 100]]` with mask `[[1, 1], [1, 0]]`, one micro-batch, 3 tokens in the step, completions of at most
        4: `grpo` 3.5, `bnpo` 3, `dr_grpo` 1.125, `dapo` 3.
    """
    valid = mask.bool()
    kept = torch.where(valid, per_token, 0.0)
    if loss_type == "grpo":
        return (kept.sum(1) / valid.sum(1).clamp(min=1)).mean() / num_micro_batches
    if loss_type == "bnpo":
        return kept.sum() / valid.sum().clamp(min=1) / num_micro_batches
    if loss_type == "dr_grpo":
        return kept.sum() / (kept.size(0) * max_completion_length) / num_micro_batches
    assert loss_type == "dapo", loss_type
    return kept.sum() / num_items


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """Return which share of the variance of the returns the values account for: 1 is perfect, 0 what a constant does.

    Args:
        values, returns: (B, T) float32. In.
        mask: (B, T). In.

    Returns:
        At most 1, negative where the values are worse than a constant; NaN where the returns do not vary.

    Example:
        Values `[1, 2, 9]`, returns `[1, 4, 9]`, mask `[1, 1, 0]`: the errors `[0, 2]` have variance 1, the returns
        2.25, so 1 - 1 / 2.25 = 0.5556.
    """
    valid = mask.bool()
    wanted = returns[valid].double()
    if wanted.numel() == 0 or bool((wanted == wanted[0]).all()):
        return float("nan")
    errors = wanted - values[valid].double()
    return 1.0 - float(errors.var(correction=0) / wanted.var(correction=0))


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the mean over the tokens that count of `x` (B, T); NaN if there are none."""
    return float(x[mask.bool()].double().mean())
