"""A restricted PRIME run that was cut off ends with the bits of one that was not, also in the middle of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training.adapted import adapted
from training.masked_runs import (
    State,
    Weights,
    losses_of,
    same_state,
    same_weights,
    state_of,
    third_of,
    weights_of,
)
from training.prime.prime_runs import GROUP, prime_trainer

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import TrainerError
from subnet_ft.training import restrict

SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
ROLLOUTS: dict[str, dict[str, Any]] = {
    "four steps per batch": {"steps_per_generation": 4, "per_device_train_batch_size": GROUP // 2},
    "two steps of two micro-batches": {
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": GROUP // 2,
    },
    "two passes": {"num_iterations": 2},
}


def restricted(folder: Path, **options: Any) -> Any:
    model = tiny_model("llama")
    trainer = prime_trainer(folder, model=model, reward_mask=third_of(model), **SAVES, **options)
    return restrict(trainer, third_of(model))


def everything(trainer: Any) -> tuple[Weights, State, Weights, State]:
    prm, prm_state = trainer.reward_model, trainer.reward_optimizer.state_dict()["state"]
    return weights_of(trainer.model), state_of(trainer), weights_of(prm), prm_state


@pytest.mark.parametrize(
    ("rollouts", "update"), [*((name, "before") for name in ROLLOUTS), ("four steps per batch", "after")]
)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_cut_off(
    rollouts: str, update: str, tmp_path: Path
) -> None:
    """Step 3 lies in the middle of a batch, and step 4 between two."""
    options = {**ROLLOUTS[rollouts], "prm_update": update, "process_coef": 50.0}
    whole = restricted(tmp_path, **options)
    whole.train()
    for step in (3, 4):
        resumed = restricted(tmp_path / "resumed", **options)
        torch.manual_seed(step)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        policy, state, prm, prm_state = everything(resumed)
        expected = everything(whole)
        same_weights(policy, expected[0])
        same_state(state, expected[1])
        same_weights(prm, expected[2])
        same_state(prm_state, expected[3])
        assert losses_of(resumed) == losses_of(whole)


def following(folder: Path, **options: Any) -> Any:
    """As `restricted`, but the reward model takes the mask of the policy by itself."""
    model = tiny_model("llama")
    return restrict(prime_trainer(folder, model=model, prm_trains="subnet", **SAVES, **options), third_of(model))


def test_prm_trains_subnet_is_the_run_with_the_policys_mask_also_resumed(tmp_path: Path) -> None:
    options = {**ROLLOUTS["four steps per batch"], "process_coef": 50.0}
    given = restricted(tmp_path / "given", **options)
    given.train()
    found = following(tmp_path / "found", **options)
    found.train()
    resumed = following(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "found" / "checkpoint-3"))
    expected = everything(given)
    for trainer in (found, resumed):
        policy, state, prm, prm_state = everything(trainer)
        same_weights(policy, expected[0])
        same_state(state, expected[1])
        same_weights(prm, expected[2])
        same_state(prm_state, expected[3])


def test_prm_trains_subnet_needs_one_mask_of_the_policys_own_weights(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"mask of the policy, which has none\. Call `restrict\(trainer, mask\)`"):
        prime_trainer(tmp_path, prm_trains="subnet").train()
    with pytest.raises(TrainerError, match="`reward_mask` names another one"):
        prime_trainer(tmp_path, prm_trains="subnet", reward_mask=third_of(tiny_model("llama")))
    with pytest.raises(TrainerError, match="that is a mask of an adapter"):
        prime_trainer(tmp_path, prm_trains="subnet", model=adapted())


def test_the_reward_model_of_a_checkpoint_matters(tmp_path: Path) -> None:
    """Shows that the test above can fail: a run resumed with a fresh reward model ends elsewhere."""
    options = {**ROLLOUTS["four steps per batch"], "process_coef": 50.0}
    whole = restricted(tmp_path, **options)
    whole.train()
    resumed = restricted(tmp_path / "resumed", **options)
    resumed.checkpoint_extras = lambda: {name: Forgetful(part) for name, part in whole.checkpoint_extras().items()}
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(AssertionError):
        same_weights(weights_of(resumed.model), weights_of(whole.model))


class Forgetful:
    """Loads nothing."""

    def __init__(self, part: Any) -> None:
        self.state_dict = part.state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def test_a_trainer_without_restrict_refuses_to_resume(tmp_path: Path) -> None:
    prime_trainer(tmp_path, **{**SAVES, "max_steps": 1}).train()
    trainer = prime_trainer(tmp_path, **SAVES)
    with pytest.raises(TrainerError, match=r"resumed at step 1.*do not hold PRIME's reward model.*`restrict\("):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
