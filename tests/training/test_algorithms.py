"""The table of algorithms against TRL as it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from subnet_ft.training import ALGORITHMS, config_fields
from subnet_ft.training.algorithms import Algorithm, build_config, run_config


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_config_fields_are_those_of_the_config(name: str, tmp_path: Path) -> None:
    known = config_fields()[name]
    assert {"learning_rate", "max_steps", "max_grad_norm", "activation_checkpointing"} <= set(known)
    options = {"output_dir": str(tmp_path), "adam_beta2": 0.25, "bf16": False, "activation_checkpointing": False}
    assert build_config(ALGORITHMS[name], options).adam_beta2 == 0.25


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_run_config_has_what_the_table_says(name: str, tmp_path: Path) -> None:
    algorithm = ALGORITHMS[name]
    config = run_config(algorithm, {}, output_dir=str(tmp_path), seed=0)
    assert {**algorithm.defaults, **algorithm.fixed}.items() <= vars(config).items()
    fields = config_fields()[name]
    assert {*algorithm.defaults, *algorithm.fixed, *algorithm.ranges} <= set(fields)


def test_run_config_lets_a_recipe_change_defaults_but_not_what_is_fixed(tmp_path: Path) -> None:
    config = run_config(ALGORITHMS["sft"], {"completion_only_loss": False}, output_dir=str(tmp_path), seed=0)
    assert config.completion_only_loss is False
    config = run_config(ALGORITHMS["simpo"], {"loss_type": "sigmoid"}, output_dir=str(tmp_path), seed=0)
    assert (config.loss_type, config.cpo_alpha) == ("simpo", 0.0)


@dataclass
class OldConfig:
    gradient_checkpointing: bool = True


def test_build_config_passes_a_field_under_its_older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subnet_ft.recipe.algorithms.load_object", lambda path: OldConfig)
    config = build_config(Algorithm("old", "a:b", "c:d"), {"activation_checkpointing": False})
    assert config == OldConfig(gradient_checkpointing=False)
    with pytest.raises(TypeError, match="unknown_field"):
        build_config(Algorithm("old", "a:b", "c:d"), {"unknown_field": 1})


def test_run_config_keeps_folder_and_seed_and_saves_only_when_asked(tmp_path: Path) -> None:
    training = {"learning_rate": 0.5, "seed": 1, "output_dir": "elsewhere"}
    config = run_config(ALGORITHMS["dpo"], training, output_dir=str(tmp_path), seed=7)
    assert (config.learning_rate, config.seed, config.output_dir) == (0.5, 7, str(tmp_path))
    assert (config.save_strategy, config.bf16, config.report_to) == ("no", False, [])
    saving = run_config(ALGORITHMS["dpo"], {"save_steps": 5}, output_dir=str(tmp_path), seed=7)
    assert (saving.save_strategy, saving.save_steps) == ("steps", 5)
