"""The implicit reward model: its scores, its one pass of training, and the weights that it leaves alone."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW
from subnet_ft.training.prime.advantages import implicit_rewards, outcome_loss
from subnet_ft.training.prime.reward_model import Completions, ImplicitRewardModel

PAD = 0
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""Two layers in float32, batched and padded in another way: sums of some dozens of terms in another order."""


def drawn(count: int, seed: int = 0) -> Completions:
    """Draw completions of one to four tokens behind prompts of one to three."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(2, 80, (count, 3), generator=generator)
    tokens = torch.randint(2, 80, (count, 4), generator=generator)
    before = torch.randint(1, 4, (count, 1), generator=generator)
    after = torch.randint(1, 5, (count, 1), generator=generator)
    prompt_mask, mask = torch.arange(3) >= 3 - before, torch.arange(4) < after
    attention_mask = torch.cat([prompt_mask, mask], dim=1)
    ids = torch.where(attention_mask, torch.cat([prompts, tokens], dim=1), PAD)
    return Completions(ids, attention_mask.long(), mask)


def starts_low(completions: Completions) -> torch.Tensor:
    """Outcome 1 where the first token of the completion is in the lower half of the vocabulary."""
    return (completions.ids[:, 3] < 41).float()


def reward_model(
    *,
    mask: SubnetMask | None = None,
    seed: int | None = None,
    micro_batch_size: int = 8,
    lr: float = 3e-3,
    max_grad_norm: float = 1.0,
) -> ImplicitRewardModel:
    """Build one on the tiny llama; with `seed`, a model that is not its reference."""
    # Dropout, and both in the mode of a policy in training: it must not show anywhere.
    reference = tiny_model("llama", dtype=torch.float32, attention_dropout=0.5).train()
    model = deepcopy(reference)
    if seed is not None:
        model.load_state_dict(tiny_model("llama", dtype=torch.float32, seed=seed).state_dict())
    everything = SubnetMask.full({name: tuple(value.shape) for name, value in model.named_parameters()})
    optimizer = MaskedAdamW(model.named_parameters(), mask or everything, lr=lr, max_grad_norm=max_grad_norm)
    return ImplicitRewardModel(
        model, reference, optimizer, beta=0.5, micro_batch_size=micro_batch_size, autocast=nullcontext
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_score_of_a_model_that_is_its_reference_is_exactly_zero() -> None:
    scores = reward_model().score(drawn(9))
    assert same_bits(scores, torch.zeros(9, 4))


def test_score_is_the_log_ratio_of_every_token_without_padding() -> None:
    prm, completions = reward_model(seed=1, micro_batch_size=4), drawn(9)
    scores = prm.score(completions)
    for row in range(9):
        ids = completions.ids[row : row + 1, completions.attention_mask[row].bool()]
        length = int(completions.mask[row].sum())
        ratio = torch.zeros(4)
        for sign, model in ((1, prm.model), (-1, prm.reference)):
            with torch.no_grad():
                log_probs = model(input_ids=ids).logits[0, -length - 1 : -1].log_softmax(dim=1)
            ratio[:length] += sign * log_probs.gather(1, ids[0, -length:].unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(scores[row], 0.5 * ratio, **CLOSE)
    assert scores[completions.mask].abs().min() > 1e-3


def test_update_returns_the_scores_from_before_it() -> None:
    prm, completions = reward_model(seed=1), drawn(16)
    before = prm.score(completions)
    seen = prm.update(completions, starts_low(completions), batch_size=16)
    torch.testing.assert_close(seen, before, **CLOSE)
    assert (prm.score(completions) - before).abs().max() > 1e-2


@pytest.mark.parametrize(("batch_size", "steps"), [(16, 1), (15, 2), (8, 2), (5, 4), (1, 16)])
def test_update_steps_as_often_as_the_batch_size_says(batch_size: int, steps: int) -> None:
    prm, completions = reward_model(), drawn(16)
    prm.update(completions, starts_low(completions), batch_size=batch_size)
    assert {int(entries["step"]) for entries in prm.optimizer.state_dict()["state"].values()} == {steps}


@pytest.mark.parametrize(("micro_batch_size", "max_grad_norm"), [(1, 1.0), (3, 0.01), (16, float("inf"))])
def test_update_is_a_step_of_torchs_adamw_on_the_mean_loss(
    micro_batch_size: int, max_grad_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    completions, lr = drawn(16), 1e-3
    outcomes = starts_low(completions)
    prm = reward_model(seed=1, micro_batch_size=micro_batch_size, lr=lr, max_grad_norm=max_grad_norm)
    twin = deepcopy(prm.model).requires_grad_()
    plain: Any = torch.optim.AdamW(twin.parameters(), lr=lr, weight_decay=0.0)
    log_probs, ref_log_probs = (
        model(input_ids=completions.ids, attention_mask=completions.attention_mask)
        .logits[:, 2:-1]
        .log_softmax(dim=2)
        .gather(2, completions.ids[:, 3:].unsqueeze(2))
        .squeeze(2)
        for model in (twin, prm.reference)
    )
    rewards = implicit_rewards(log_probs, ref_log_probs.detach(), completions.mask, beta=0.5)
    outcome_loss(rewards, outcomes).mean().backward()
    norm = torch.stack([value.grad.norm() for value in twin.parameters()]).norm()
    start = weights(prm.model)
    norms, step = [], prm.optimizer.step
    monkeypatch.setattr(prm.optimizer, "step", lambda: norms.append(prm.optimizer.grad_norm()) or step())
    prm.update(completions, outcomes, batch_size=16)
    torch.testing.assert_close(norms, [norm], **CLOSE)
    torch.nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm)
    plain.step()
    far = 0
    for name, value in weights(twin).items():
        # Adam's first step is lr times a sign; where the gradient is next to 0, rounding decides.
        far += int(((prm.model.get_parameter(name) - value).abs() > 0.1 * lr).sum())
        assert (value - start[name]).abs().max() > 0.9 * lr
    assert far <= 0.002 * sum(value.numel() for value in start.values())


def test_update_with_a_mask_keeps_the_bits_of_every_other_weight_and_of_the_reference() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    mask = random_mask(model, 0.2)
    prm, completions = reward_model(mask=mask), drawn(16)
    start, reference = weights(prm.model), weights(prm.reference)
    for _ in range(3):
        prm.update(completions, starts_low(completions), batch_size=8)
    for name, value in weights(prm.model).items():
        assert same_bits(value[~mask[name]], start[name][~mask[name]]), name
        assert (value != start[name])[mask[name]].float().mean() > 0.5, name
    assert all(same_bits(value, reference[name]) for name, value in weights(prm.reference).items())


def test_update_draws_no_random_number_and_leaves_no_gradient() -> None:
    prm, completions = reward_model(), drawn(8)
    state = torch.get_rng_state()
    prm.update(completions, starts_low(completions), batch_size=8)
    assert same_bits(torch.get_rng_state(), state)
    assert all(value.grad is None for value in (*prm.model.parameters(), *prm.reference.parameters()))
    assert prm.optimizer.names_without_gradient() == list(prm.optimizer.mask.names)


@pytest.mark.parametrize("sign", [1, -1])
def test_update_teaches_to_rank_completions_never_seen(sign: int) -> None:
    """With outcomes turned around the ranking is turned around, so a wrong sign anywhere would show."""
    prm = reward_model(lr=1e-2)
    for seed in range(60):
        completions = drawn(32, seed)
        outcomes = starts_low(completions)
        prm.update(completions, outcomes if sign == 1 else 1 - outcomes, batch_size=32)
    fresh = drawn(400, seed=1000)
    outcomes, scores = starts_low(fresh), prm.score(fresh).sum(dim=1)
    ahead = scores[outcomes == 1].unsqueeze(1) > scores[outcomes == 0]
    accuracy = float(ahead.float().mean())
    assert accuracy > 0.75 if sign == 1 else accuracy < 0.25
