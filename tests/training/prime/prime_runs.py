"""Small PRIME runs on a tiny llama, in a world whose best policy is known: the first token must be a lower-case letter.

About a third of the tokens are, so that a random policy succeeds about as often.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from helpers import QUIET
from transformers import PreTrainedModel

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.training.algorithms import Algorithm, build_config
from subnet_ft.training.prime import PRIMETrainer

PRIME = Algorithm("prime", "subnet_ft.training.prime:PRIMETrainer", "subnet_ft.training.prime:PRIMEConfig")
LENGTH = 3
GROUP = 8


def starts_low(completions: list[str], **columns: Any) -> list[float]:
    """Reward 1 for a completion whose first character is a lower-case letter, 0 for any other."""
    return [float("a" <= completion[:1] <= "z") for completion in completions]


def prime_trainer(
    folder: Path, *, model: PreTrainedModel | None = None, rewards: Any = starts_low, **options: Any
) -> PRIMETrainer:
    """Build a trainer; the same options give the same run, bit by bit.

    Args:
        folder: Its `output_dir`.
        model: Trained instead of a fresh tiny llama in float32.
        rewards: Its reward functions.
        options: Fields of the config that replace the common ones, and further arguments of the constructor.
    """
    arguments = {name: options.pop(name) for name in ("reward_model", "reward_mask", "peft_config") if name in options}
    known = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": LENGTH,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "prm_learning_rate": 1e-3,
        "accuracy_low": 0.0,
        "accuracy_high": 1.0,
        "bf16": False,
        "activation_checkpointing": False,
        **QUIET,
        **options,
    }
    return PRIMETrainer(
        model=tiny_model("llama", dtype=torch.float32) if model is None else model,
        args=build_config(PRIME, known),
        train_dataset=Dataset.from_dict({"prompt": [f"{a} + {b} = " for a in range(4) for b in (3, 8)]}),
        processing_class=tiny_tokenizer(),
        reward_funcs=rewards,
        **arguments,
    )


def logged(trainer: PRIMETrainer, name: str) -> list[float]:
    """Return what the log has under a name, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
