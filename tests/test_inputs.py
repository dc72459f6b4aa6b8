from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from recipe_texts import GRPO
from safetensors.torch import load_file, save_file

from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.errors import CheckpointError
from subnet_ft.inputs import RunInputs
from subnet_ft.recipe import load_recipe
from subnet_ft.recipe.algorithms import ALGORITHMS


def settings(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    """What a training stage of a small GRPO recipe records of `training`."""
    (tmp_path / "recipe.yaml").write_text(GRPO)
    recorded: dict[str, Any] = RunInputs(load_recipe(tmp_path / "recipe.yaml", overrides)).of_training(None, "full")
    return dict(recorded["training"])


def test_of_training_counts_processes_as_accumulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = settings(tmp_path)
    accumulated = settings(tmp_path, "training.gradient_accumulation_steps=4")
    generating = ["training.gradient_accumulation_steps=8", "training.steps_per_generation=8"]
    both = settings(tmp_path, *generating)
    assert "gradient_accumulation_steps" not in own
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert settings(tmp_path) == accumulated
    assert settings(tmp_path, *(f"{entry[:-1]}2" for entry in generating)) == both


def test_language_model_refuses_weights_in_parts(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    places = {name: {"saved_offsets": [0] * weight.dim()} for name, weight in weights.items()}
    part = base / "shard-00001-model-00001-of-00001.safetensors"
    save_file(weights, part, metadata={"DCP_SHARDING_INFO": json.dumps(places)})
    (base / "model.safetensors").unlink()
    (tmp_path / "recipe.yaml").write_text(GRPO)
    inputs = RunInputs(load_recipe(tmp_path / "recipe.yaml", [f"model.name={base}"]))
    with pytest.raises(CheckpointError, match="no model is trained from them"):
        inputs.check()


@pytest.mark.parametrize("name", [name for name, row in ALGORITHMS.items() if not row.needs_one_process])
def test_every_config_accumulates_nothing_unless_it_is_told_to(name: str) -> None:
    """What `of_training` takes for granted where a recipe does not say it."""
    config = ALGORITHMS[name].config_class
    (field,) = (field for field in fields(config) if field.name == "gradient_accumulation_steps")
    assert field.default == 1
