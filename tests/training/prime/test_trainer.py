"""`PRIMETrainer`: what it makes of GRPO's rollouts, which prompts teach, what it logs and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import random_mask, same_bits
from training.prime.prime_runs import GROUP, LENGTH, logged, prime_trainer, starts_low

from subnet_ft.checkpoints.tiny import save_tiny, tiny_model
from subnet_ft.errors import MaskMismatchError, TaskError, TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.training import restrict
from subnet_ft.training.prime import PRIMETrainer
from subnet_ft.training.prime.advantages import prime_advantages
from subnet_ft.training.prime.reward_model import Completions

Weights = dict[str, torch.Tensor]


def weights(model: Any) -> Weights:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(a: Weights, b: Weights) -> bool:
    return all(same_bits(value, b[name]) for name, value in a.items())


def rows(*prompts: str) -> list[dict[str, str]]:
    return [{"prompt": prompt} for prompt in prompts for _ in range(GROUP)]


def joined(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts with completions, and their attention mask."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


def some_ids(count: int) -> list[list[int]]:
    """Draw completions without an end."""
    return torch.randint(2, 80, (count, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()


def replayed(trainer: PRIMETrainer, ids: list[list[int]], *prompts: str) -> dict[str, Any]:
    """Score given completions, one after the other, instead of sampling."""
    trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (ids[: len(prompt_ids)], None)
    return sampled(trainer, *prompts)


def sampled(trainer: PRIMETrainer, *prompts: str, training: bool = True) -> dict[str, Any]:
    """Sample completions of some prompts, score them and return the batch."""
    trainer.model.train(training)
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions(rows(*prompts or PROMPTS[:2]))


class Fixed:
    """Gives the outcomes of a list, over and over."""

    __name__ = "fixed"

    def __init__(self, *outcomes: float | None) -> None:
        self.outcomes = list(outcomes)

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        return [self.outcomes[i % len(self.outcomes)] for i in range(len(completions))]


PROMPTS = ("1 + 2 = ", "4 + 5 = ", "7 + 1 = ")
MEDIUM = {"accuracy_low": 0.2, "accuracy_high": 0.8}
MIXED = [1.0, 0.0] * (GROUP // 2)
EASY, HARD = [1.0] * GROUP, [0.0] * GROUP


def test_reward_model_and_reference_start_as_the_policy_and_share_nothing_with_it(tmp_path: Path) -> None:
    trainer = prime_trainer(tmp_path)
    start = weights(trainer.model)
    for model in (trainer.reward_model, trainer.ref_model):
        assert same(weights(model), start)
    batch = sampled(trainer)
    ids, _ = joined(batch)
    with torch.no_grad():
        before = trainer.ref_model(input_ids=ids).logits
        for value in trainer.model.parameters():
            value.zero_()
        assert same_bits(trainer.ref_model(input_ids=ids).logits, before)
    assert before.std() > 0.1


def test_policy_by_path_gives_the_run_of_the_same_policy_in_memory(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base", dtype=torch.float32)
    runs = []
    for model in (str(folder), tiny_model("llama", dtype=torch.float32)):
        trainer = prime_trainer(tmp_path / "run", model=model)
        trainer.train()
        runs.append((weights(trainer.model), weights(trainer.reward_model)))
    (by_path, prm_by_path), (in_memory, prm_in_memory) = runs
    assert same(by_path, in_memory)
    assert same(prm_by_path, prm_in_memory)


def test_another_reward_model_is_trained_in_place_against_the_policys_start(tmp_path: Path) -> None:
    other = tiny_model("llama", dtype=torch.float32, seed=1)
    start = weights(other)
    trainer = prime_trainer(tmp_path, reward_model=other)
    assert same(weights(trainer.ref_model), weights(trainer.model))
    trainer.train()
    assert trainer.reward_model is other
    assert not same(weights(other), start)
    assert abs(logged(trainer, "prime/process_reward")[0]) > 1e-3


@pytest.mark.parametrize("update", ["before", "after"])
def test_advantages_are_those_of_the_scores_and_outcomes(tmp_path: Path, update: str) -> None:
    trainer = prime_trainer(tmp_path, prm_update=update, rewards=Fixed(*MIXED), gamma=0.9, process_coef=3.0)
    batch = sampled(trainer)
    mask = batch["completion_mask"].bool()
    scores = torch.zeros(mask.shape)
    if update == "before":  # after it, the first batch was scored by a copy of the reference
        scores = trainer._prm.score(Completions(*joined(batch), mask))
        assert scores.abs().max() > 1e-4
    expected = prime_advantages(
        scores,
        torch.tensor(2 * MIXED),
        mask,
        mask.any(dim=1),
        group_size=GROUP,
        gamma=0.9,
        outcome_coef=1.0,
        process_coef=3.0,
    )
    assert same_bits(batch["advantages"], expected)


def test_advantages_per_token_reach_the_loss_and_its_gradient(tmp_path: Path) -> None:
    trainer = prime_trainer(tmp_path, process_coef=50.0)
    batch = sampled(trainer)
    advantages, mask = batch["advantages"], batch["completion_mask"].bool()
    assert advantages.shape == (2 * GROUP, LENGTH)
    assert (advantages[:, 0] != advantages[:, 1]).all()
    loss = trainer._compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss.detach(), -advantages[mask].mean(), rtol=1e-4, atol=1e-6)
    loss.backward()
    found = {name: value.grad.clone() for name, value in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    ids, attention_mask = joined(batch)
    logits = trainer.model(input_ids=ids, attention_mask=attention_mask).logits[:, -LENGTH - 1 : -1]
    log_probs = logits.log_softmax(dim=2).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    (-(advantages * log_probs)[mask].sum() / mask.sum()).backward()
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo"])
def test_a_filtered_prompt_teaches_neither_policy_nor_reward_model(tmp_path: Path, loss_type: str) -> None:
    """Both learn what the remaining prompt alone teaches; "grpo", a mean over completions, counts the others as 0."""
    ids = some_ids(3 * GROUP)
    gradients, prms = [], []
    for outcomes, prompts in (([*MIXED, *EASY, *HARD], PROMPTS), (MIXED, PROMPTS[:1])):
        trainer = prime_trainer(tmp_path, rewards=Fixed(*outcomes), loss_type=loss_type, **MEDIUM)
        batch = replayed(trainer, ids, *prompts)
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum() == GROUP * LENGTH
        assert batch["advantages"][GROUP:].abs().sum() == 0
        trainer._compute_loss(trainer.model, batch).backward()
        gradients.append(torch.cat([value.grad.flatten() for value in trainer.model.parameters()]))
        prms.append(weights(trainer.reward_model))
    many, alone = gradients
    assert alone.norm() > 1e-2
    torch.testing.assert_close(many * (3 if loss_type == "grpo" else 1), alone, rtol=1e-3, atol=1e-5)
    assert not same(prms[1], weights(tiny_model("llama", dtype=torch.float32)))
    assert same(*prms)


@pytest.mark.parametrize("outcomes", [EASY, HARD], ids=["easy", "hard"])
def test_a_step_without_a_prompt_that_teaches_has_a_gradient_of_zero(tmp_path: Path, outcomes: list[float]) -> None:
    trainer: Any = prime_trainer(tmp_path, rewards=Fixed(*outcomes), **MEDIUM)
    start = weights(trainer.model)
    restrict(trainer, SubnetMask.full({name: tuple(value.shape) for name, value in start.items()}))
    trainer.train()
    assert logged(trainer, "grad_norm") == logged(trainer, "loss") == [0.0, 0.0]
    assert logged(trainer, "prime/filtered") == [1.0, 1.0]
    assert logged(trainer, "prime/prm_loss") == []
    assert same(weights(trainer.model), start)
    assert same(weights(trainer.reward_model), start)


def test_a_step_without_a_prompt_that_teaches_may_stand_between_others(tmp_path: Path) -> None:
    outcomes = iter([MIXED, EASY, MIXED, HARD])
    trainer = prime_trainer(
        tmp_path, rewards=lambda completions, **columns: 2 * next(outcomes), max_steps=4, logging_steps=4, **MEDIUM
    )
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["prime/filtered"] == 0.5
    assert all(math.isfinite(entry[name]) for name in ("loss", "grad_norm", "prime/prm_loss", "prime/advantage"))
    assert all(value.isfinite().all() for value in trainer.model.parameters())


def test_a_completion_cut_off_counts_with_its_outcome_unless_it_is_masked(tmp_path: Path) -> None:
    """Half of the completions end; the others are right, or wrong, without an end."""
    ends = [[10, 11, 1], [10, 1], [10, 11, 12], [13, 14, 15]] * (GROUP // 4)
    fixed = Fixed(1.0, 0.0, 1.0, 1.0)
    batch = replayed(prime_trainer(tmp_path, rewards=fixed, process_coef=0.0), ends, PROMPTS[0])
    right, wrong = 1 - 5 / 7, 0 - 6 / 7
    torch.testing.assert_close(batch["advantages"][:4, 0], torch.tensor([right, wrong, right, right]))
    masked = prime_trainer(tmp_path, rewards=fixed, process_coef=0.0, mask_truncated_completions=True)
    batch = replayed(masked, ends, PROMPTS[0])
    torch.testing.assert_close(batch["advantages"][:4, 0], torch.tensor([2 / 3, -2 / 3, 0.0, 0.0]))
    assert batch["completion_mask"][:4].tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert batch["num_items_in_batch"] == 5 * GROUP // 4


def test_a_completion_without_a_reward_is_out_of_everything(tmp_path: Path) -> None:
    trainer = prime_trainer(tmp_path, rewards=Fixed(1.0, 0.0, None, None), process_coef=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.grpo_trainer.logger.warning", lambda *args: None)
        batch = sampled(trainer, PROMPTS[0])
    torch.testing.assert_close(batch["advantages"][:4, 0], torch.tensor([2 / 3, -2 / 3, 0.0, 0.0]))
    assert batch["completion_mask"].any(dim=1).tolist() == [True, True, False, False] * (GROUP // 4)


def test_the_outcome_is_the_weighted_sum_of_the_reward_functions(tmp_path: Path) -> None:
    halves = [Fixed(*MIXED), Fixed(*[1.0] * 4, *[0.0] * 4)]
    trainer = prime_trainer(tmp_path, rewards=halves, reward_weights=[0.25, 0.75], process_coef=0.0)
    batch = sampled(trainer, PROMPTS[0])
    outcomes = torch.tensor([1, 0.75, 1, 0.75, 0.25, 0, 0.25, 0])
    torch.testing.assert_close(batch["advantages"][:, 0], outcomes - (outcomes.sum() - outcomes) / 7)


@pytest.mark.parametrize("wrong", [-1.0, 1.5, float("inf")])
def test_outcomes_outside_0_and_1_are_refused(tmp_path: Path, wrong: float) -> None:
    trainer = prime_trainer(tmp_path, rewards=Fixed(1.0, 0.0, wrong, 0.0))
    message = rf"weighted sum of fixed, must lie in \[0, 1\] .*got {wrong:g}\. .*`reward_weights` \(now \[1\.0\]\)"
    with pytest.raises(TaskError, match=message):
        sampled(trainer)


def test_log_has_loss_and_accuracy_on_completions_not_learned_from(tmp_path: Path) -> None:
    trainer = prime_trainer(tmp_path, log_completions=True)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "prime/prm_loss" in entry)
    assert first["prime/prm_loss"] == pytest.approx(math.log(2))  # before the first update it knows nothing
    assert first["prime/prm_accuracy"] == 0.5
    assert first["prime/process_reward"] != 0  # and after it something
    assert first["prime/filtered"] == 0
    assert first["loss"] == pytest.approx(-first["prime/advantage"], abs=1e-6)
    assert list(trainer._logs["advantages"])[:GROUP] != [0.0] * GROUP


def test_the_table_of_completions_has_primes_advantages(tmp_path: Path) -> None:
    trainer = prime_trainer(tmp_path)
    batch = sampled(trainer, PROMPTS[0])
    means = batch["advantages"].sum(dim=1) / batch["completion_mask"].sum(dim=1)
    assert list(trainer._logs["advantages"]) == pytest.approx(means.tolist())


def test_evaluation_scores_and_trains_nothing(tmp_path: Path) -> None:
    trainer = prime_trainer(tmp_path, per_device_eval_batch_size=2 * GROUP)
    trainer.train()
    start = weights(trainer.reward_model)
    found = trainer.evaluate(trainer.train_dataset)
    assert same(weights(trainer.reward_model), start)
    names = ("prm_loss", "prm_accuracy", "process_reward", "filtered", "advantage")
    assert all(math.isfinite(trainer.state.log_history[-1][f"eval_prime/{name}"]) for name in names)
    assert math.isfinite(found["eval_loss"])


def test_evaluation_of_single_completions_has_no_baseline_and_no_advantage(tmp_path: Path) -> None:
    trainer = prime_trainer(tmp_path, num_generations_eval=1)
    batch = sampled(trainer, PROMPTS[0], training=False)
    assert batch["advantages"].abs().sum() == 0


def test_reward_mask_of_another_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskMismatchError, match="shape"):
        prime_trainer(tmp_path, reward_mask=random_mask(tiny_model("llama", hidden_size=64), 0.5))


def test_reward_mask_keeps_the_bits_of_the_other_weights(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    mask = random_mask(model, 0.2)
    trainer = prime_trainer(tmp_path, reward_mask=mask, prm_weight_decay=0.1)
    trainer.train()
    for name, value in weights(trainer.reward_model).items():
        start, chosen = model.get_parameter(name), mask[name]
        assert same_bits(value[~chosen], start.detach()[~chosen]), name
        assert not same_bits(value[chosen], start.detach()[chosen]), name


def test_trainer_refuses_what_prime_cannot_work_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import GRPOConfig

    with pytest.raises(TrainerError, match="must be a `PRIMEConfig`, got GRPOConfig"):
        PRIMETrainer(tiny_model("llama"), starts_low, GRPOConfig(str(tmp_path), bf16=False, use_cpu=True))
    trainer = prime_trainer(tmp_path)
    for name, value, message in (
        ("_is_vlm", True, "text only"),
        ("args", SimpleNamespace(world_size=2), "one process, and here are 2"),
    ):
        monkeypatch.setattr(trainer, name, value)
        with pytest.raises(TrainerError, match=message):
            trainer._refuse()
