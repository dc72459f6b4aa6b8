"""The options of distilling step-by-step: the paper's weight, and nothing that mixes labels with rationales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET

from subnet_ft.training.algorithms import ALGORITHMS, build_config
from subnet_ft.training.step_by_step import StepByStepConfig


def config(folder: Path, **options: Any) -> StepByStepConfig:
    known = {"output_dir": str(folder), "bf16": False, **QUIET, **options}
    made: StepByStepConfig = build_config(ALGORITHMS["distilling_step_by_step"], known)
    return made


def test_step_by_step_config_weighs_rationales_as_the_paper_does(tmp_path: Path) -> None:
    options = config(tmp_path)
    assert options.rationale_weight == 1.0
    assert options.completion_only_loss is True
    assert options.remove_unused_columns is False


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rationale_weight": -0.1}, "rationale_weight"),
        ({"rationale_weight": float("inf")}, "rationale_weight"),
        ({"completion_only_loss": False}, "completion_only_loss"),
        ({"completion_only_loss": None}, "completion_only_loss"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"packing": True}, "packing"),
        ({"padding_free": True}, "padding_free"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "(activation|gradient)_checkpointing_kwargs"),
    ],
)
def test_step_by_step_config_refuses_what_mixes_the_two_losses(
    options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must"):
        config(tmp_path, **options)
