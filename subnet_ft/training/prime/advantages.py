"""PRIME's arithmetic: implicit process rewards, the loss of the model behind them, and advantages per token.

B completions come in groups of `group_size` for one prompt each, next to each other; T tokens, right-padded.

Source: Cui et al. 2025 (arXiv 2502.01456). Where the authors' code (verl, `recipe/prime`) differs, this follows the
paper: the last token has a process reward like any other; process rewards are not divided by their largest return in
the batch; both parts have weight 1 by default; advantages are not whitened.
"""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

_TOLERANCE = 1e-6
"""For comparing a mean of outcomes with a bound: some float32 units in the last place."""


def implicit_rewards(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor, mask: torch.Tensor, *, beta: float
) -> torch.Tensor:
    """Return the process reward of every token, beta log(pi_phi / pi_ref), and 0 outside the mask.

    Args:
        log_probs: (B, T) float32, of the tokens under the reward model. In.
        ref_log_probs: (B, T) float32, under the reference. In.
        mask: (B, T) bool, the tokens that count. In.
        beta: Scale, > 0.

    Returns:
        (B, T) float32.

    Example:
        log_probs [-1, -2, -9], ref_log_probs [-2, -1.5, 0], mask [1, 1, 0], beta 0.5: rewards [0.5, -0.25, 0].

    Source: Eq. 3.
    """
    # Selected, not multiplied: what stands at padding may be infinite.
    return torch.where(mask, beta * (log_probs - ref_log_probs), 0.0)


def outcome_loss(rewards: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    """Return each completion's cross-entropy between its outcome and sigmoid(sum of its process rewards).

    Args:
        rewards: (B, T) float32, 0 outside the mask. In.
        outcomes: (B,) float32 in [0, 1]. In.

    Returns:
        (B,) float32.

    Example:
        rewards [[0.5, 0.5], [0, -2]], outcomes [1, 1]: losses -log sigmoid(1) = 0.3133 and -log sigmoid(-2) = 2.1269.

    Source: Algorithm 1, line 8.
    """
    return binary_cross_entropy_with_logits(rewards.sum(dim=1), outcomes, reduction="none")


def leave_one_out(values: torch.Tensor, is_scored: torch.Tensor, *, group_size: int) -> torch.Tensor:
    """Return for each completion the mean value of the others of its group, and 0 without others.

    Args:
        values: (B,) float32. In.
        is_scored: (B,) bool; the others count for nobody. In.
        group_size: Completions per prompt.

    Returns:
        (B,) float32.

    Example:
        values [1, 0, 0.5, 9], all but the last scored, group_size 4: baselines [0.25, 0.75, 0.5, 0.5].

    Source: Eq. 4, after Ahmadian et al. 2024 (arXiv 2402.14740).
    """
    counted = torch.where(is_scored, values, 0.0).view(-1, group_size)
    scored = is_scored.view(-1, group_size).to(values.dtype)
    others = scored.sum(dim=1, keepdim=True) - scored
    return ((counted.sum(dim=1, keepdim=True) - counted) / others.clamp(min=1.0)).view(-1)


def discounted_sums(rewards: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """Return for each token the sum of its reward and the later ones, gamma^(s - t) times that of token s.

    Args:
        rewards: (B, T) float32. In.
        gamma: Discount in [0, 1].

    Returns:
        (B, T) float32.

    Example:
        rewards [1, 2, 4], gamma 0.5: sums [1 + 1 + 1, 2 + 2, 4] = [3, 4, 4].
    """
    sums = torch.empty_like(rewards)
    later = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        later = rewards[:, t] + gamma * later
        sums[:, t] = later
    return sums


def prime_advantages(
    rewards: torch.Tensor,
    outcomes: torch.Tensor,
    mask: torch.Tensor,
    is_scored: torch.Tensor,
    *,
    group_size: int,
    gamma: float,
    outcome_coef: float,
    process_coef: float,
) -> torch.Tensor:
    """Return the advantage of every token, and 0 outside the mask.

    Process rewards lose the leave-one-out mean of the group's mean process rewards (per token of each completion),
    and are then summed from each token on; outcomes lose their own leave-one-out mean.

    Args:
        rewards: (B, T) float32, process rewards, 0 outside the mask. In.
        outcomes: (B,) float32. In.
        mask: (B, T) bool. In.
        is_scored: (B,) bool; the others get no advantage, and count in no baseline. In.
        group_size: Completions per prompt.
        gamma: Discount in [0, 1].
        outcome_coef, process_coef: Weights of the two parts.

    Returns:
        (B, T) float32.

    Example:
        One group of 2: rewards [[0.4, 0.2], [0.1, 0]], mask [[1, 1], [1, 0]], outcomes [1, 0], gamma 0.5, weights 1.
        Mean process rewards 0.3 and 0.1, so the baselines are 0.1 and 0.3. Process part: [0.3 + 0.5 * 0.1, 0.1] and
        [-0.2, 0]; outcome part: +1 and -1. Advantages [[1.35, 1.1], [-1.2, 0]].

    Source: Eq. 5.
    """
    means = rewards.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    baselines = leave_one_out(means, is_scored, group_size=group_size)
    process = discounted_sums(torch.where(mask, rewards - baselines.unsqueeze(1), 0.0), gamma=gamma)
    outcome = outcomes - leave_one_out(outcomes, is_scored, group_size=group_size)
    advantages = process_coef * process + outcome_coef * outcome.unsqueeze(1)
    return torch.where(mask & is_scored.unsqueeze(1), advantages, 0.0)


def within_accuracy(
    outcomes: torch.Tensor, is_scored: torch.Tensor, *, group_size: int, low: float, high: float
) -> torch.Tensor:
    """Say which completions are scored and belong to a prompt of medium difficulty: low <= mean outcome <= high.

    A prompt with fewer than two scored completions is left out as well: it has no baseline.

    Args:
        outcomes: (B,) float32. In.
        is_scored: (B,) bool. In.
        group_size: Completions per prompt.
        low, high: Bounds in [0, 1], both inclusive.

    Returns:
        (B,) bool.

    Example:
        outcomes [1, 1, 1, 0], all scored, group_size 2, low 0.2, high 0.8: kept [0, 0, 1, 1].

    Source: Section 3.3.
    """
    scored = is_scored.view(-1, group_size)
    count = scored.sum(dim=1)
    accuracy = torch.where(is_scored, outcomes, 0.0).view(-1, group_size).sum(dim=1) / count.clamp(min=1)
    is_kept = (accuracy >= low - _TOLERANCE) & (accuracy <= high + _TOLERANCE) & (count >= 2)
    return (is_kept.unsqueeze(1) & scored).view(-1)


def pair_accuracy(scores: torch.Tensor, outcomes: torch.Tensor, is_scored: torch.Tensor, *, group_size: int) -> float:
    """Return the share of pairs of a prompt's completions that the scores order as the outcomes do; a tie is a half.

    Args:
        scores: (B,) float32, implicit rewards of whole completions. In.
        outcomes: (B,) float32. In.
        is_scored: (B,) bool; pairs with another completion are not counted. In.
        group_size: Completions per prompt.

    Returns:
        A number in [0, 1]; NaN without a pair of different outcomes.

    Example:
        scores [0.3, 0.1, 0.2], outcomes [1, 0, 0], group_size 3: 1. With scores [0.1, 0.1, 0.2]: (0.5 + 0) / 2 = 0.25.

    Source: Section 5.1.
    """
    scored = is_scored.view(-1, group_size)
    grouped, labels = scores.view(-1, group_size), outcomes.view(-1, group_size)
    is_better = labels.unsqueeze(2) > labels.unsqueeze(1)
    pairs = is_better & scored.unsqueeze(2) & scored.unsqueeze(1)
    ahead = (grouped.unsqueeze(2) - grouped.unsqueeze(1))[pairs]
    return float((0.5 * (1 + ahead.sign())).mean())
