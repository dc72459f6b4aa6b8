"""Short runs of a restricted `transformers.Trainer` on a tiny model: built, cut off and resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUIET
from masked_optimizers import only
from training.every_trainer import TRAINERS
from training.masked_runs import Watch, third_of
from transformers import Trainer, TrainerCallback

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.masks import SubnetMask
from subnet_ft.training import SubnetTrainerMixin, restrict
from subnet_ft.training.algorithms import Algorithm, build_config

FROZEN = "model.layers.0.self_attn.q_proj.weight"
"""A tensor of which the usual mask trains nothing."""

SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
FIRST_IS_BEST: dict[str, Any] = {
    **SAVES,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
}
"""Evaluates and saves at every step, and takes the largest loss for the best, which is that of the first step."""


class SubnetTrainer(SubnetTrainerMixin, Trainer):
    """The class form."""


def plain(
    folder: Path,
    *,
    model: torch.nn.Module | None = None,
    trainer_class: type[Trainer] = Trainer,
    callbacks: Sequence[TrainerCallback] = (),
    arguments: Mapping[str, Any] | None = None,
    **config: Any,
) -> Trainer:
    """Build a trainer of four steps, three to an epoch; the same options give the same run, bit by bit.

    Args:
        folder: Its `output_dir`.
        model: Trained instead of a fresh tiny llama in bfloat16.
        trainer_class: Its class.
        callbacks: Given to its constructor.
        arguments: Other arguments of its constructor.
        config: Fields of `TrainingArguments` that replace the common ones.
    """
    known = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 3e-2,
        "weight_decay": 0.1,
        **QUIET,
        **config,
    }
    kind = TRAINERS["Trainer"]
    data = kind.data()
    return trainer_class(
        model=tiny_model("llama") if model is None else model,
        args=build_config(Algorithm("Trainer", kind.trainer, kind.config), known),
        train_dataset=data,
        eval_dataset=data if known.get("eval_strategy") else None,
        callbacks=list(callbacks),
        **(arguments or {}),
    )


def restricted(
    folder: Path, *, mask: SubnetMask | None = None, subnet: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """Restrict such a trainer, by default to `usual_mask()`; `subnet` are keywords of `restrict`."""
    return restrict(plain(folder, **options), mask or usual_mask(), **(subnet or {}))


def usual_mask() -> SubnetMask:
    """Mask a third of every tensor of the tiny llama, and nothing of `FROZEN`."""
    return third_of(tiny_model("llama"))


def mask_of(seed: int, density: float = 0.3) -> SubnetMask:
    """Mask other weights of the tiny llama, some of `FROZEN` among them."""
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(seed)
    return only(model, {n: torch.rand(p.shape, generator=generator) < density for n, p in model.named_parameters()})


def cut_off(trainer: Trainer, *, after: int) -> None:
    """Train, and break the run off at the end of a step, before anything of that step is saved."""

    def stop(step: int) -> None:
        if step == after:
            raise InterruptedError

    watch = Watch(end=stop)
    trainer.add_callback(watch)
    with pytest.raises(InterruptedError):
        trainer.train()
    trainer.remove_callback(watch)


def steps_of(trainer: Trainer) -> list[int]:
    """Return a list that gets the number of every step from now on."""
    steps: list[int] = []
    trainer.add_callback(Watch(end=steps.append))
    return steps


def damaged(file: Path) -> None:
    """Change one bit in the middle of a file, which keeps its size."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
