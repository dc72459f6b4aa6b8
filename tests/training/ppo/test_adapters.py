"""PPO on a policy with an adapter: its reference is the base, its value model starts from the base and has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from peft import LoraConfig
from small_runs import cut_off
from training.adapted import KINDS, adapted, half_of_the_adapter, kept
from training.masked_runs import check_weights, losses_of, same_state, same_weights, state_of, weights_of
from training.ppo.ppo_runs import batch_of, logged, ppo, values_of
from training.ppo.test_learning import BANDIT, first_probabilities

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.methods.adapters import adapter_parameters
from subnet_ft.training import restrict
from subnet_ft.training.ppo import ValueModel


def ppo_on(model: Any, folder: Path, **options: Any) -> Any:
    with kept(model):
        return ppo(folder, model=model, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_base(kind: str, tmp_path: Path) -> None:
    trainer = ppo_on(adapted(kind, distance=1.0), tmp_path)
    plain = ppo(tmp_path)
    batch = batch_of(trainer)
    found = trainer._reference_logps(batch)
    assert trainer.ref_model is None
    assert same_bits(found, plain._logps(plain.ref_model, batch))
    assert not same_bits(found, trainer._policy_logps(batch))


@pytest.mark.parametrize(("kind", "starts_at_the_base"), [("lora", True), ("prompt_tuning", False)])
def test_kl_is_that_to_the_base_from_the_first_step_on(kind: str, starts_at_the_base: bool, tmp_path: Path) -> None:
    trainer = ppo_on(adapted(kind), tmp_path, max_steps=1)
    trainer.train()
    (kl,) = logged(trainer, "kl")
    assert (kl == 0.0) == starts_at_the_base


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_model_is_that_of_the_base(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, distance=1.0)
    expected = dict(ValueModel(tiny_model("llama", dtype=torch.float32)).named_parameters())
    found = dict(ppo_on(model, tmp_path).value_model.named_parameters())
    assert list(found) == list(expected)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    for name, weight in found.items():
        assert same_bits(weight.detach(), expected[name].detach()), name
        assert weight.requires_grad
        assert weight.data_ptr() not in shared


def test_a_masked_run_leaves_the_base_and_the_rest_of_the_adapter_alone(tmp_path: Path) -> None:
    model = adapted(distance=0.1)
    mask, start = half_of_the_adapter(model), weights_of(model)
    still = list(adapter_parameters(model).values())[-1]
    trainer = restrict(ppo_on(model, tmp_path, max_steps=4), mask, audit_steps=1)
    value = values_of(trainer)
    trainer.train()
    check_weights(model, mask, start)
    assert not still.requires_grad
    assert max(logged(trainer, "kl")) > 0
    assert all(not same_bits(value[name], weight) for name, weight in values_of(trainer).items())


RESUMED = {"max_steps": 6, "steps_per_generation": 2, "num_iterations": 2, "lr_scheduler_type": "linear"}


def masked(folder: Path, **options: Any) -> Any:
    model = adapted(dtype=torch.bfloat16, distance=0.1)
    return restrict(ppo_on(model, folder, **{**RESUMED, **options}), half_of_the_adapter(model))


def test_a_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Completions serve four steps; 2 and 3 lie inside, 4 between two batches."""
    straight = masked(tmp_path / "straight")
    straight.train()
    cut_off(masked(tmp_path / "cut", save_strategy="steps", save_steps=1), after=5)
    for step in (2, 3, 4):
        again = masked(tmp_path / "cut")
        again.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
        assert losses_of(again) == losses_of(straight)
        assert logged(again, "value/loss") == logged(straight, "value/loss")
        same_weights(weights_of(again.model), weights_of(straight.model))
        same_weights(values_of(again), values_of(straight))
        same_state(state_of(again), state_of(straight))


@pytest.mark.parametrize("kind", ["lora", "adapters"])
def test_an_adapter_finds_the_token_that_pays(kind: str, tmp_path: Path) -> None:
    wanted = None

    def pays(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(ids[0] == wanted) for ids in completion_ids]

    model = adapted(kind, sharpness=4.0)
    trainer = ppo_on(model, tmp_path, reward=pays, **{**BANDIT, "kl_coef": 1e-3, "learning_rate": 3e-3})
    before = first_probabilities(trainer)
    wanted = int(before.argsort(descending=True)[3])
    base = {name: weight for name, weight in weights_of(model).items() if name not in adapter_parameters(model)}
    trainer.train()
    assert before[wanted] < 0.2
    assert first_probabilities(trainer)[wanted] > 0.9
    same_weights({name: weights_of(model)[name] for name in base}, base)


@pytest.mark.filterwarnings("ignore:.*PEFT")
def test_an_adapter_that_trl_adds_is_one_too(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = ppo(tmp_path, arguments={"peft_config": config})
    plain = ppo(tmp_path)
    batch = batch_of(trainer)
    assert trainer.ref_model is None
    assert same_bits(trainer._reference_logps(batch), plain._logps(plain.ref_model, batch))
    assert list(values_of(trainer)) == list(values_of(plain))
    trainer.train()
