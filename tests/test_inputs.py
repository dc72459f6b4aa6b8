from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from recipe_texts import GRPO

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


@pytest.mark.parametrize("name", [name for name, row in ALGORITHMS.items() if not row.needs_one_process])
def test_every_config_accumulates_nothing_unless_it_is_told_to(name: str) -> None:
    """What `of_training` takes for granted where a recipe does not say it."""
    config = ALGORITHMS[name].config_class
    (field,) = (field for field in fields(config) if field.name == "gradient_accumulation_steps")
    assert field.default == 1
