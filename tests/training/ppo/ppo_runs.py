"""Short PPO runs on the tiny llama: built, with rewards that a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from helpers import QUIET
from training.masked_runs import Watch
from transformers import PreTrainedModel, Trainer

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.training.algorithms import Algorithm, build_config

PPO = Algorithm("ppo", "subnet_ft.training.ppo:PPOTrainer", "subnet_ft.training.ppo:PPOConfig")


def letters(completions: list[str], **columns: Any) -> list[float]:
    """Reward that differs between almost any two completions."""
    return [sum(map(ord, completion)) % 7 / 7 for completion in completions]


def ppo(
    folder: Path,
    *,
    model: PreTrainedModel | None = None,
    reward: Callable[..., list[Any]] = letters,
    prompts: list[str] | None = None,
    trainer_class: type[Trainer] | None = None,
    arguments: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Build a PPO trainer; the same options give the same run, bit by bit.

    Args:
        folder: Its `output_dir`.
        model: Trained instead of a fresh tiny llama in float32.
        reward: Its reward function.
        prompts: Its data.
        trainer_class: Its class.
        arguments: Other arguments of its constructor.
        options: Fields of `PPOConfig` that replace the common ones.
    """
    known = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "value_learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "activation_checkpointing": False,
        **QUIET,
        **options,
    }
    given = [f"{a} + {b} = " for a in range(6) for b in (3, 8)] if prompts is None else prompts
    return (trainer_class or PPO.trainer_class)(
        model=tiny_model("llama", dtype=torch.float32) if model is None else model,
        args=build_config(PPO, known),
        train_dataset=Dataset.from_dict({"prompt": given}),
        processing_class=tiny_tokenizer(),
        reward_funcs=reward,
        **(arguments or {}),
    )


def batch_of(trainer: Any) -> dict[str, Any]:
    """Sample the completions of the trainer's first step, and return its first micro-batch."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    batch: dict[str, Any] = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return batch


def logged(trainer: Any, key: str) -> list[float]:
    """Return what the logs say under a key, step by step."""
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


def values_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Return copies of the weights of the value model."""
    return {name: value.detach().clone() for name, value in trainer.value_model.named_parameters()}


def each_value_step(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """Return a list that gets the weights of the value model at the end of every step."""
    seen: list[dict[str, torch.Tensor]] = []
    trainer.add_callback(Watch(end=lambda step: seen.append(values_of(trainer))))
    return seen
