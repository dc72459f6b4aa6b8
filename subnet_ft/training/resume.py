"""What an interrupted run may continue from."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# The trainer writes its own state last, so a checkpoint that has it whole was written whole.
_STATE = "trainer_state.json"
_NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


class NoSaveAtTheEnd(TrainerCallback):
    """Keeps the trainer from saving after its last step: resuming from there would take one step too many."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Take back a save at the last step."""
        if state.global_step >= state.max_steps:
            control.should_save = False
        return control

    on_epoch_end = on_step_end


def newest_complete(folder: Path) -> Path | None:
    """Return the newest trainer checkpoint in `folder` that is whole; broken ones are removed.

    A broken one was being written or removed when the run was killed. Resuming from it would silently start the
    optimizer or the random state anew.
    """
    complete: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        if step.isdigit() and _is_complete(path):
            complete.append((int(step), path))
        else:
            logger.warning("removing `%s`, which was not written whole", path)
            shutil.rmtree(path)
    return max(complete)[1] if complete else None


def replay_epochs(trainer: Any, checkpoint: Path) -> None:
    """Make a resumed trainer draw its prompts in the order in which the interrupted run would have.

    TRL's sampler of prompts has a generator of its own that moves on once per epoch, and a new process starts it anew;
    so the orders of the finished epochs are drawn again and thrown away. Other samplers are left as they are.
    """
    finished = int(json.loads((checkpoint / _STATE).read_text())["epoch"])
    original = trainer._get_train_sampler

    def replayed(*args: Any, **kwargs: Any) -> Any:
        sampler = original(*args, **kwargs)
        if type(sampler).__name__ == "RepeatSampler" and sampler.shuffle:
            for _ in range(finished):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    trainer._get_train_sampler = replayed


def remove_checkpoints(folder: Path) -> None:
    """Remove the trainer checkpoints of a finished run; the logs of `report_to` stay."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def _is_complete(path: Path) -> bool:
    try:
        json.loads((path / _STATE).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    has_weights = (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file()
    return has_weights and all((path / name).is_file() for name in _NEEDED)
