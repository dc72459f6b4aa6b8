"""The table of algorithms against TRL as it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from subnet_ft.recipe.training import ALGORITHM_DATA
from subnet_ft.training import ALGORITHMS, config_fields
from subnet_ft.training.algorithms import Algorithm, build_config, run_config


def test_every_algorithm_is_known_to_recipes_and_the_other_way_round() -> None:
    assert set(ALGORITHMS) == set(ALGORITHM_DATA)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_config_fields_are_those_of_the_config(name: str, tmp_path: Path) -> None:
    known = config_fields()[name]
    assert {"learning_rate", "max_steps", "beta", "activation_checkpointing"} <= set(known)
    config = build_config(
        ALGORITHMS[name], {"output_dir": str(tmp_path), "beta": 0.25, "bf16": False, "activation_checkpointing": False}
    )
    assert config.beta == 0.25


@dataclass
class OldConfig:
    gradient_checkpointing: bool = True


def test_build_config_passes_a_field_under_its_older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subnet_ft.training.algorithms._load", lambda path: OldConfig)
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
