"""Trainers of labels and rationales on a tiny model, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from helpers import QUIET

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.training.algorithms import ALGORITHMS, build_config
from subnet_ft.training.step_by_step import StepByStepTrainer


def row(name: str, prompt: str, completion: str) -> dict[str, Any]:
    return {"prompt": f"[{name}] {prompt}", "completion": completion, "is_rationale": name == "rationale"}


def build_trainer(rows: list[dict[str, Any]], folder: Path, **options: Any) -> StepByStepTrainer:
    """Build a trainer in float32, without activation checkpointing unless `options` say so."""
    known = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "activation_checkpointing": False,
        **QUIET,
        **options,
    }
    return StepByStepTrainer(
        model=tiny_model("llama", dtype=torch.float32),
        args=build_config(ALGORITHMS["distilling_step_by_step"], known),  # older releases have older names
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
