"""PRIME on a policy with an adapter: the reference is the base, and the reward model starts from it and has none."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from helpers import same_bits
from peft import LoraConfig
from training.adapted import KINDS, adapted, half_of_the_adapter, kept
from training.masked_runs import check_weights, losses_of, same_state, same_weights, state_of, weights_of
from training.prime.prime_runs import GROUP, logged, prime_trainer
from training.prime.test_learning import LEARNING
from training.prime.test_reward_model import drawn

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import TrainerError
from subnet_ft.methods.adapters import adapter_parameters
from subnet_ft.training import restrict

COMPLETIONS = drawn(9)


def prime_on(model: Any, folder: Path, **options: Any) -> Any:
    with kept(model):
        return prime_trainer(folder, model=model, **options)


def reference_log_probs(trainer: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = trainer._prm._log_probs(trainer._prm.reference, COMPLETIONS)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_reference_and_reward_model_are_the_base(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, distance=1.0)
    trainer = prime_on(model, tmp_path)
    plain = prime_trainer(tmp_path)
    assert trainer.ref_model is None
    assert same_bits(reference_log_probs(trainer), reference_log_probs(plain))
    found, expected = weights_of(trainer.reward_model), weights_of(plain.reward_model)
    assert list(found) == list(expected)
    same_weights(found, expected)
    assert same_bits(trainer._prm.score(COMPLETIONS), torch.zeros(9, 4))
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in shared for parameter in trainer.reward_model.parameters())


def test_the_reference_stays_the_base_while_the_adapter_moves(tmp_path: Path) -> None:
    trainer = prime_on(adapted(), tmp_path)
    before = reference_log_probs(trainer)
    trainer.train()
    assert same_bits(reference_log_probs(trainer), before)
    assert trainer._prm.score(COMPLETIONS).any()


def test_another_reward_model_needs_no_copy_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a quantized base, which cannot be one, gets along with a dense one."""
    model = adapted()
    model.get_base_model().is_quantized = True
    with pytest.raises(TrainerError, match="base is quantized"):
        prime_on(model, tmp_path)
    other = tiny_model("llama", dtype=torch.float32, seed=1)
    monkeypatch.setattr("subnet_ft.training.prime.trainer.base_of", lambda model: pytest.fail("copied"))
    model.get_base_model().is_quantized = False  # TRL looks for quantized layers, too
    trainer = prime_on(model, tmp_path, reward_model=other)
    assert trainer.reward_model is other
    assert same_bits(reference_log_probs(trainer), reference_log_probs(prime_trainer(tmp_path)))


def test_a_masked_run_leaves_the_base_and_the_rest_of_the_adapter_alone(tmp_path: Path) -> None:
    model = adapted(distance=0.1)
    mask, start = half_of_the_adapter(model), weights_of(model)
    still = list(adapter_parameters(model).values())[-1]
    trainer = restrict(prime_on(model, tmp_path, max_steps=4), mask, audit_steps=1)
    reward = weights_of(trainer.reward_model)
    trainer.train()
    check_weights(model, mask, start)
    assert not still.requires_grad
    moved = [name for name, weight in weights_of(trainer.reward_model).items() if not same_bits(weight, reward[name])]
    assert len(moved) == len(reward)


def masked(folder: Path, **options: Any) -> Any:
    model = adapted(dtype=torch.bfloat16, distance=0.1)
    batches = {"steps_per_generation": 4, "per_device_train_batch_size": GROUP // 2, "process_coef": 50.0}
    return restrict(prime_on(model, folder, max_steps=5, **batches, **options), half_of_the_adapter(model))


def test_a_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Step 3 lies in the middle of a batch, and step 4 between two."""
    whole = masked(tmp_path, save_strategy="steps", save_steps=1)
    whole.train()
    for step in (3, 4):
        resumed = masked(tmp_path / "resumed")
        torch.manual_seed(step)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses_of(resumed) == losses_of(whole)
        same_weights(weights_of(resumed.model), weights_of(whole.model))
        same_weights(weights_of(resumed.reward_model), weights_of(whole.reward_model))
        same_state(state_of(resumed), state_of(whole))


def test_an_adapter_learns_from_outcomes_and_process_rewards(tmp_path: Path) -> None:
    model = adapted(sharpness=4.0)
    base = {name: weight for name, weight in weights_of(model).items() if name not in adapter_parameters(model)}
    trainer = prime_on(model, tmp_path, **{**LEARNING, "learning_rate": 1e-2})
    trainer.train()
    rewards = logged(trainer, "reward")
    assert fmean(rewards[:3]) < 0.5
    assert fmean(rewards[-10:]) > 0.8
    same_weights({name: weights_of(model)[name] for name in base}, base)


@pytest.mark.filterwarnings("ignore:.*PEFT")
def test_an_adapter_that_trl_adds_is_one_too(tmp_path: Path) -> None:
    trainer = prime_trainer(tmp_path, peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    plain = prime_trainer(tmp_path)
    assert trainer.ref_model is None
    assert same_bits(reference_log_probs(trainer), reference_log_probs(plain))
    assert list(weights_of(trainer.reward_model)) == list(weights_of(plain.reward_model))
    trainer.train()
