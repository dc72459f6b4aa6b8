"""PPO learns what can be learned: one token that pays, and returns that the prompt tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training.ppo.ppo_runs import logged, ppo

from subnet_ft.checkpoints.tiny import tiny_tokenizer
from subnet_ft.training.ppo import PPOTrainer

PROMPT = "1 + 1 = "
BANDIT = {
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "prompts": [PROMPT] * 2,
    "max_completion_length": 3,
    "max_steps": 40,
    "kl_coef": 0.0,
}


class Reversed(PPOTrainer):
    """Gets the sign of every advantage wrong."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        return {**output, "advantages": -output["advantages"]}


class Shifted(PPOTrainer):
    """Gives every completion the advantages of another one."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        return {**output, "advantages": output["advantages"].roll(1, dims=0)}


def first_probabilities(trainer: Any) -> torch.Tensor:
    """Return the probability (V,) of every first token of a completion."""
    ids = torch.tensor([tiny_tokenizer()(PROMPT)["input_ids"]])
    with torch.no_grad():
        probabilities: torch.Tensor = trainer.model(input_ids=ids).logits[0, -1].float().softmax(-1)
    return probabilities


def bandit(folder: Path, trainer_class: type[PPOTrainer] = PPOTrainer, **options: Any) -> tuple[float, float, Any]:
    """Pay 1 for completions that start with one token; return its probability before and after, and the trainer."""
    wanted = None

    def pays(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(ids[0] == wanted) for ids in completion_ids]

    trainer = ppo(folder, reward=pays, trainer_class=trainer_class, **{**BANDIT, **options})
    wanted = int(first_probabilities(trainer).argsort(descending=True)[3])
    before = float(first_probabilities(trainer)[wanted])
    trainer.train()
    return before, float(first_probabilities(trainer)[wanted]), trainer


def test_ppo_finds_the_token_that_pays(tmp_path: Path) -> None:
    before, after, trainer = bandit(tmp_path)
    assert before < 0.2
    assert after > 0.9
    assert sum(logged(trainer, "reward")[-5:]) / 5 > 0.9


@pytest.mark.parametrize("broken", [Reversed, Shifted])
def test_ppo_with_broken_advantages_does_not_find_it(tmp_path: Path, broken: type[PPOTrainer]) -> None:
    before, after, _ = bandit(tmp_path, broken)
    assert after < 0.3, (before, after)


def test_ppo_finds_it_over_several_epochs_per_batch(tmp_path: Path) -> None:
    _, after, trainer = bandit(tmp_path, num_iterations=4, max_steps=60)
    assert after > 0.9
    assert max(logged(trainer, "clip_ratio/region_mean")) > 0


def test_kl_to_the_reference_costs(tmp_path: Path) -> None:
    """Where leaving the reference costs more than the token pays, the policy stays near it."""
    _, free, moved = bandit(tmp_path, kl_coef=1e-9)
    _, bound, stayed = bandit(tmp_path, kl_coef=2.0)
    assert free > 0.9
    assert bound < 0.5
    assert sum(logged(stayed, "kl")[-5:]) < 0.3 * sum(logged(moved, "kl")[-5:])


def test_explained_variance_rises_where_the_prompt_tells_the_return(tmp_path: Path) -> None:
    def by_prompt(prompts: list[str], **columns: Any) -> list[float]:
        return [float(prompt.startswith("9")) for prompt in prompts]

    trainer = ppo(
        tmp_path,
        reward=by_prompt,
        prompts=["9 + 1 = ", "1 + 1 = "],
        per_device_train_batch_size=8,
        num_generations=4,
        max_steps=30,
        learning_rate=1e-3,
        kl_coef=0.0,
        lam=1.0,
    )
    trainer.train()
    explained = logged(trainer, "value/explained_variance")
    assert explained[0] == pytest.approx(0, abs=1e-6)
    assert min(explained[-5:]) > 0.9
    losses = logged(trainer, "value/loss")
    assert max(losses[-5:]) < 0.1 * losses[0]
