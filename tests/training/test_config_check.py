"""What a `training` section would trip over later is found before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from subnet_ft.errors import RecipeError
from subnet_ft.recipe import load_recipe, shipped_recipes
from subnet_ft.training import ALGORITHMS, config_fields
from subnet_ft.training.config_check import config_problems


@pytest.fixture
def only_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the check find no optional package, whatever is installed."""
    monkeypatch.setattr("subnet_ft.training.config_check.importlib.util.find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("training", "reason"),
    [
        ({"num_generations": 7, "per_device_train_batch_size": 64}, "(64) must be divisible by num_generations (7)"),
        ({"generation_batch_size": 64, "steps_per_generation": 2}, "can not be both configured"),
        ({"accelerator_config": {"no_such": 1}}, "no_such"),
        ({"accelerator_config": "no/such.json"}, "No such file"),
        ({"parallelism_config": {"a": 1}}, "no attribute"),
    ],
)
def test_config_problems_passes_on_what_the_config_refuses(training: dict[str, Any], reason: str) -> None:
    ((key, message),) = config_problems("grpo", training)
    assert key == "training"
    assert message.startswith("GRPOConfig refuses these settings: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.usefixtures("only_torch")
@pytest.mark.parametrize(
    ("training", "key", "reason"),
    [
        ({"use_vllm": True}, "training.use_vllm", "`pip install 'trl[vllm]'`"),
        ({"report_to": "wandb"}, "training.report_to", "`wandb` is not installed; `pip install wandb`"),
        ({"report_to": ["comet_ml"]}, "training.report_to", "`pip install comet-ml`"),
    ],
)
def test_config_problems_names_the_missing_package(training: dict[str, Any], key: str, reason: str) -> None:
    ((found, message),) = config_problems("grpo", training)
    assert found == key
    assert message.endswith(reason) or reason in message


def test_config_problems_accepts_a_package_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("json")
    monkeypatch.setattr(
        "subnet_ft.training.config_check.importlib.util.find_spec",
        lambda name: spec if name in ("wandb", "tensorboardX") else None,
    )
    assert not list(config_problems("dpo", {"report_to": ["wandb", "tensorboard"]}))
    assert not list(config_problems("dpo", {"report_to": "none"}))


def test_config_problems_refuses_an_unknown_tracker() -> None:
    ((key, message),) = config_problems("dpo", {"report_to": "wandbb"})
    assert key == "training.report_to"
    assert "wandbb is not supported" in message


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"save_steps": 3, "num_iterations": 2}, "(3 x 1 = 3) must be a multiple of"),
        ({"save_steps": 3, "num_iterations": 2}, "(1 x 2 = 2); the nearest `save_steps` is 4"),
        ({"save_steps": 1, "num_iterations": 4}, "the nearest `save_steps` is 4"),
        ({"save_steps": 10, "gradient_accumulation_steps": 2, "steps_per_generation": 8}, "(10 x 2 = 20)"),
        ({"save_steps": 10, "gradient_accumulation_steps": 2, "steps_per_generation": 8}, "(8 x 1 = 8)"),
        ({"save_steps": 10, "generation_batch_size": 24, "per_device_train_batch_size": 8}, "`save_steps` is 9"),
        ({"save_strategy": "steps", "num_iterations": 3}, "(500 x 1 = 500)"),
        ({"save_steps": 0.25, "max_steps": 20, "num_iterations": 2}, "(5 x 1 = 5)"),
        ({"save_steps": 0.25, "num_iterations": 2}, "a multiple of 2, got the fraction 0.25"),
    ],
)
def test_config_problems_refuses_checkpoints_inside_a_generation(training: dict[str, Any], expected: str) -> None:
    ((key, message),) = config_problems("grpo", training)
    assert key == "training.save_steps"
    assert expected in message


@pytest.mark.parametrize(
    "training",
    [
        {"save_steps": 3},
        {"save_steps": 3, "gradient_accumulation_steps": 4},
        {"save_steps": 4, "num_iterations": 2},
        {"save_steps": 12, "gradient_accumulation_steps": 2, "steps_per_generation": 8},
        {"save_steps": 3, "gradient_accumulation_steps": 8, "steps_per_generation": 2, "num_iterations": 4},
        {"save_steps": 25, "max_steps": 25, "num_iterations": 2},
        {"num_iterations": 2},
        {"save_steps": 3, "save_strategy": "no", "num_iterations": 2},
        {"save_steps": 0.25},
    ],
)
def test_config_problems_allows_checkpoints_between_generations(training: dict[str, Any]) -> None:
    assert not list(config_problems("grpo", training))


@pytest.mark.parametrize("name", [name for name, known in ALGORITHMS.items() if known.judge == "rewards"])
def test_config_problems_knows_the_generations_of_every_algorithm_with_rewards(name: str) -> None:
    ((key, message),) = config_problems(name, {"save_steps": 3, "num_iterations": 2})
    assert key == "training.save_steps"
    assert "the nearest `save_steps` is 4" in message


@pytest.mark.parametrize("name", [name for name, known in ALGORITHMS.items() if known.judge != "rewards"])
def test_config_problems_knows_no_generations_of_the_others(name: str) -> None:
    assert not list(config_problems(name, {"save_steps": 3, "gradient_accumulation_steps": 2}))


@pytest.mark.parametrize(
    ("name", "training", "reason"),
    [
        ("rloo", {"num_generations": 3}, "RLOOConfig refuses these settings: "),
        ("ppo", {"beta": 0.1}, "PPOConfig refuses these settings: `beta` adds a KL term"),
        ("prime", {"accuracy_low": 0.9}, "PRIMEConfig refuses these settings: `accuracy_low`"),
        ("ppo", {"sync_ref_model": True}, "PPOConfig refuses these settings: `sync_ref_model` must stay false"),
        ("prime", {"sync_ref_model": True}, "PRIMEConfig refuses these settings: `sync_ref_model` must stay false"),
        ("raft", {"warmup_steps": -1}, "SFTConfig refuses these settings: "),
    ],
)
def test_config_problems_asks_the_config_of_the_algorithm(name: str, training: dict[str, Any], reason: str) -> None:
    ((key, message),) = config_problems(name, training)
    assert key == "training"
    assert message.startswith(reason)


@pytest.mark.parametrize("name", [name for name, _ in shipped_recipes()])
def test_config_problems_finds_none_in_a_shipped_recipe(name: str) -> None:
    recipe = load_recipe(name, algorithms=config_fields(), check_config=config_problems)
    assert not list(config_problems(recipe.algorithm, recipe.training))


def test_load_recipe_reports_what_the_config_refuses(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="num_generations") as caught:
        load_recipe("tiny/grpo", ["training.num_generations=7"], check_config=config_problems)
    assert len(caught.value.problems) == 1
