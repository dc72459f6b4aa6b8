"""A run trains and saves in the dtype that its base is stored in, so that the two compare bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.errors import CheckpointError
from subnet_ft.masks import extract
from subnet_ft.pipeline import load_checked_recipe
from subnet_ft.training import run as training_run

ROUTER = "model.layers.1.mlp.gate.weight"
PAIRS = Dataset.from_list([{"prompt": f"{a} + 1 = ", "chosen": f"{a + 1}", "rejected": "?"} for a in range(8)])


def train(base: Path, folder: Path, **options: Any) -> training_run.TrainingRun:
    recipe = load_checked_recipe("tiny/dpo", ["training.max_steps=1", f"output={folder}"])
    return training_run.train(recipe, base=base, folder=folder, dataset=PAIRS, task=None, **options)


def test_train_saves_the_dtypes_of_the_base(tmp_path: Path) -> None:
    """transformers 5.24 loads the routers of this family in float32, and TRL those of the reference model."""
    base, full, subnet = save_tiny("deepseek_v3", tmp_path / "base"), tmp_path / "full", tmp_path / "subnet"
    finished = train(base, full, mask=None)
    assert finished.memory["reference_model"] == finished.memory["weights"]
    mask = extract(base, full)
    assert mask[ROUTER].any()
    train(base, subnet, mask=mask)
    assert open_checkpoint(base).specs == open_checkpoint(full).specs == open_checkpoint(subnet).specs


def test_train_refuses_weights_that_stay_in_another_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model = training_run.load_model

    def load_with_precise_router(*args: Any, **options: Any) -> Any:
        model, tokenizer = load_model(*args, **options)
        router = model.get_parameter(ROUTER)
        router.data = router.data.float() + 2.0**-20
        return model, tokenizer

    monkeypatch.setattr(training_run, "load_model", load_with_precise_router)
    base = save_tiny("deepseek_v3", tmp_path / "base")
    with pytest.raises(CheckpointError, match=rf"than `model\.dtype: bfloat16`.*: `?{ROUTER}.*torch\.bfloat16"):
        train(base, tmp_path / "full", mask=None)
    assert not (tmp_path / "full").exists()
