"""`PPOTrainer`: what it makes of a batch of completions, and what of that reaches the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from training.masked_runs import Watch, weights_of
from training.ppo.ppo_runs import batch_of, letters, logged, ppo
from training.upstream import override_problems
from trl import GRPOConfig, GRPOTrainer

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.errors import TrainerError
from subnet_ft.training.ppo import PPOTrainer, ValueModel
from subnet_ft.training.ppo.functions import aggregate, gae, last_tokens, per_token_rewards, value_loss, whiten

RAW = {"lam": 1.0, "kl_coef": 0.0, "whiten_advantages": False}
"""With values of zero, an advantage is then the score of its completion."""


def some_head(trainer: Any) -> None:
    """Give the value model something to say."""
    torch.nn.init.normal_(trainer.value_model.score.weight, generator=torch.Generator().manual_seed(0))


def scores_of(batch: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(letters(tiny_tokenizer().batch_decode(batch["completion_ids"], skip_special_tokens=True)))


def logps_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Compute log-probabilities of the completions (B, T) from the logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
    chosen = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return chosen[:, -batch["completion_ids"].size(1) :]


def test_every_token_has_the_score_of_its_own_completion_after_shuffling_and_splitting(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, steps_per_generation=4, **RAW)
    batch_of(trainer)
    assert len(trainer._buffered_inputs) == 4
    seen = []
    for batch in trainer._buffered_inputs:
        expected = scores_of(batch)[:, None] * batch["completion_mask"]
        torch.testing.assert_close(batch["advantages"], expected)
        torch.testing.assert_close(batch["returns"], expected)
        assert not batch["old_values"].any()
        seen += scores_of(batch).tolist()
    assert len(set(seen)) > 3


def test_a_batch_is_what_its_parts_say(tmp_path: Path) -> None:
    """KL against the model as it was, values of the value model, GAE, whitening: each from its own source."""
    trainer = ppo(tmp_path, kl_coef=0.3, gamma=0.9, lam=0.8, num_iterations=2)
    some_head(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = batch_of(trainer)
    mask = batch["completion_mask"]
    torch.testing.assert_close(batch["old_per_token_logps"] * mask, logps_of(trainer.model, batch) * mask)
    kl = logps_of(trainer.model, batch) - logps_of(tiny_model("llama", dtype=torch.float32), batch)
    assert kl.abs().max() > 0.01
    assert trainer._metrics["train"]["kl"] == [pytest.approx(float(kl[mask.bool()].mean()), abs=1e-5)]
    with torch.no_grad():
        values = trainer.value_model(
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], mask], 1),
            mask.size(1),
        )
    torch.testing.assert_close(batch["old_values"], values)
    rewards = per_token_rewards(scores_of(batch), kl, mask, kl_coef=0.3)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    torch.testing.assert_close(batch["advantages"], whiten(advantages, mask), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch["returns"], returns, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}])
def test_the_penalty_goes_by_the_policy_that_sampled(tmp_path: Path, options: dict[str, Any]) -> None:
    """TRL has its log-probabilities only where the policy moves between sampling and training."""
    trainer = ppo(tmp_path, kl_coef=1.0, **options)
    batch = batch_of(trainer)
    assert ("old_per_token_logps" in batch) == bool(options)
    assert trainer._metrics["train"]["kl"] == [pytest.approx(0, abs=1e-6)]
    assert trainer.model.training


def test_without_a_price_for_kl_there_is_no_reference(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, kl_coef=0.0, max_steps=1)
    trainer.train()
    assert trainer.ref_model is None
    assert "kl" not in trainer.state.log_history[0]


def test_the_reference_stays_where_the_policy_was(tmp_path: Path) -> None:
    trainer = ppo(tmp_path)
    start = weights_of(trainer.model)
    trainer.train()
    for name, weight in weights_of(trainer.ref_model).items():
        assert same_bits(weight, start[name])
    assert any(not same_bits(weight, start[name]) for name, weight in weights_of(trainer.model).items())
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_the_reference_computes_what_the_policy_did(tmp_path: Path) -> None:
    """However it is called: for logits, and by TRL for the probabilities of tokens."""
    trainer = ppo(tmp_path)
    batch = batch_of(trainer)
    before = logps_of(trainer.model.eval(), batch)
    by_trl = trainer._reference_logps(batch)
    trainer.train()
    assert same_bits(logps_of(trainer.ref_model, batch), before)
    assert same_bits(trainer._reference_logps(batch), by_trl)
    assert (logps_of(trainer.model.eval(), batch) - before).abs().max() > 0.01
    mask = batch["completion_mask"]
    torch.testing.assert_close(by_trl * mask, before * mask)


def test_one_tokens_advantage_changes_the_gradient_at_that_token_only(tmp_path: Path) -> None:
    trainer = ppo(tmp_path)
    batch = batch_of(trainer)
    shape = batch["completion_mask"].shape

    def gradient(advantages: torch.Tensor) -> torch.Tensor:
        logps = torch.full(shape, -1.0, requires_grad=True)
        trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps, torch.zeros(shape), None)
        trainer._compute_loss(trainer.model, {**batch, "advantages": advantages}).backward()
        assert logps.grad is not None
        return logps.grad

    before = gradient(batch["advantages"])
    changed = batch["advantages"].clone()
    changed[1, 2] += 1
    moved = gradient(changed) - before
    assert moved[1, 2] < 0  # a larger advantage makes the token more likely
    moved[1, 2] = 0
    assert not moved.any()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_the_value_loss_is_summed_up_as_grpo_sums_up_its_own(tmp_path: Path, loss_type: str) -> None:
    """Where the ratio is 1, the loss of a token in GRPO is its advantage with the other sign."""
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_completion_length": 9}
    trainer = ppo(tmp_path, loss_type=loss_type, **options)
    some_head(trainer)
    batch = batch_of(trainer)
    batch["completion_mask"][0, 3:] = 0  # completions of two lengths
    batch["returns_mask"] = batch["completion_mask"]
    batch["old_per_token_logps"] = None  # the ratio is 1
    with torch.no_grad():
        per_token, _ = value_loss(trainer._values(batch), batch["old_values"], batch["returns"], cliprange=0.2)
        expected = GRPOTrainer._compute_loss(trainer, trainer.model, {**batch, "advantages": -per_token})
        policy = GRPOTrainer._compute_loss(trainer, trainer.model, batch)
        trainer.args.vf_coef = 0.5
        found = trainer._compute_loss(trainer.model, batch)
    assert float(expected) > 0.01
    torch.testing.assert_close(found - policy, 0.5 * expected)


def test_one_backward_gives_the_policy_grpos_gradient_and_the_value_model_its_own(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, vf_coef=3.0)
    some_head(trainer)
    batch = batch_of(trainer)
    trainer._compute_loss(trainer.model, batch).backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    GRPOTrainer._compute_loss(trainer, trainer.model, batch).backward()
    assert all(same_bits(found[name], p.grad) for name, p in trainer.model.named_parameters())
    twin = ValueModel(tiny_model("llama", dtype=torch.float32))
    twin.load_state_dict(trainer.value_model.state_dict())
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    values = twin(ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1), 4)
    per_token, _ = value_loss(values, batch["old_values"], batch["returns"], cliprange=0.2)
    mask = batch["completion_mask"]
    loss = aggregate(
        per_token, mask, loss_type="dapo", num_micro_batches=1, num_items=mask.sum(), max_completion_length=4
    )
    (3.0 * loss).backward()
    norm = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]).norm()
    assert float(trainer.value_optimizer.grad_norm()) == pytest.approx(float(norm), rel=1e-4)


def test_a_completion_that_nobody_scored_is_left_out(tmp_path: Path) -> None:
    def some(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if row % 2 else 1.0 + row for row in range(len(completions))]

    trainer = ppo(tmp_path, reward=some, kl_coef=0.1, lam=1.0)
    some_head(trainer)
    batch = batch_of(trainer)
    out = ~batch["returns_mask"].any(1)
    assert out.sum() == 2
    assert not batch["advantages"][out].any()
    assert batch["advantages"][~out].any()
    assert all(batch[key].isfinite().all() for key in ("advantages", "returns", "old_values"))

    def gradient(**other: torch.Tensor) -> float:
        trainer.value_optimizer.zero_grad()
        trainer._compute_loss(trainer.model, {**batch, **other}).backward()
        return float(trainer.value_optimizer.grad_norm())

    spoiled = torch.where(out[:, None], 1e6, batch["returns"])
    assert gradient(returns=spoiled) == gradient()


def ending(trainer: Any, *, eos: list[int | None]) -> dict[str, Any]:
    """Sample completions of 4 tokens that end where `eos` says; `None` never ends."""
    cut = [[7] * 4 if end is None else [7] * end + [1] for end in eos]
    trainer._generate_single_turn = lambda *args, **kwargs: (cut, None)
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": "1 + 1 = "}] * len(eos))


def test_a_completion_that_is_cut_off_ends_there(tmp_path: Path) -> None:
    batch = ending(ppo(tmp_path, reward=lambda completions, **_: [1.0] * 4, **RAW), eos=[None, 1, 3, None])
    assert batch["completion_mask"].sum(1).tolist() == [4, 2, 4, 4]
    assert batch["advantages"].tolist() == batch["completion_mask"].float().tolist()
    assert last_tokens(batch["completion_mask"]).long().argmax(1).tolist() == [3, 1, 3, 3]


def test_a_completion_that_is_cut_off_pays_for_it(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, reward=lambda completions, **_: [1.0] * 4, missing_eos_penalty=0.75, **RAW)
    batch = ending(trainer, eos=[None, 1, 3, None])
    assert batch["advantages"].tolist() == [[0.25] * 4, [1, 1, 0, 0], [1] * 4, [0.25] * 4]


def test_every_token_that_ends_a_completion_ends_it(tmp_path: Path) -> None:
    """Those of the model, of which there may be several, the tokenizer's, and padding, as TRL counts them."""
    trainer = ppo(tmp_path)
    for of_the_model, expected in (
        ([5, 6], [False, False, False, False, True]),
        (5, [False, True, False, False, True]),
    ):
        trainer.model.generation_config.eos_token_id = of_the_model
        ids = torch.tensor([[7, 5], [7, 6], [7, 1], [7, 0], [5, 7]])
        found = trainer._is_cut_off({"completion_ids": ids, "completion_mask": torch.ones_like(ids)})
        assert found.tolist() == expected


def test_a_completion_that_is_cut_off_can_be_left_out(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, reward=lambda completions, **_: [1.0] * 4, mask_truncated_completions=True, **RAW)
    batch = ending(trainer, eos=[None, 1, 3, None])
    assert batch["advantages"].tolist() == [[0] * 4, [1, 1, 0, 0], [1] * 4, [0] * 4]
    assert batch["returns_mask"].tolist() == batch["completion_mask"].tolist()


def test_scores_are_weighted_sums_of_raw_rewards(tmp_path: Path) -> None:
    def twos(completions: list[str], **columns: Any) -> list[float | None]:
        return [2.0, None, 2.0, None]

    trainer = ppo(tmp_path, reward=[lambda completions, **_: [5.0] * 4, twos], reward_weights=[1.0, 10.0], **RAW)
    batch = ending(trainer, eos=[3] * 4)
    assert batch["advantages"][:, 0].tolist() == [25, 5, 25, 5]


def test_what_is_logged(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, num_iterations=2, max_steps=4, cliprange_value=1e-4, value_learning_rate=1e-3)
    trainer.train()
    assert logged(trainer, "value/grad_norm")[0] > 0
    assert all(loss > 0 for loss in logged(trainer, "value/loss"))
    clipped = logged(trainer, "value/clip_ratio")
    assert clipped[0] == clipped[2] == 0  # the value model has not moved since the completions were sampled
    assert clipped[1] > 0
    sampled = [entry for entry in trainer.state.log_history if "value/explained_variance" in entry]
    assert [entry["step"] for entry in sampled] == [1, 3]
    assert sampled[0]["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert sampled[0]["value/mean_return"] > 0
    assert sampled[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert sampled[1]["kl"] != pytest.approx(0, abs=1e-6)


def test_ppo_evaluates(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, per_device_eval_batch_size=4)
    found = trainer.evaluate(trainer.train_dataset)
    assert found["eval_loss"] > 0
    assert {"eval_value/loss", "eval_value/explained_variance", "eval_kl"} <= trainer.state.log_history[-1].keys()


def test_ppo_needs_its_own_config(tmp_path: Path) -> None:
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, use_cpu=True, bf16=False, report_to="none")
    data = ppo(tmp_path).train_dataset
    with pytest.raises(TrainerError, match="`args` must be a `PPOConfig`, got `GRPOConfig`"):
        PPOTrainer(tiny_model("llama"), letters, args, data, processing_class=tiny_tokenizer())


def test_ppo_keeps_to_the_methods_of_a_trainer() -> None:
    assert override_problems(PPOTrainer, GRPOTrainer) == []


def test_ppo_refuses_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = ppo(tmp_path)
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
    with pytest.raises(TrainerError, match="trains its value model in one process, and this run has 2"):
        trainer._check()


def test_ppo_trains_a_given_value_model(tmp_path: Path) -> None:
    other = ValueModel(tiny_model("qwen2", dtype=torch.float32))
    trainer = ppo(tmp_path, arguments={"value_model": other})
    seen: list[int] = []
    trainer.add_callback(Watch(end=seen.append))
    trainer.train()
    assert trainer.value_model is other
    assert other.score.weight.any()
    assert seen == [1, 2]
