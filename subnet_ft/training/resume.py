"""What an interrupted run may continue from."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subnet_ft.checkpoints.parts import SHARDED
from subnet_ft.errors import CheckpointError
from subnet_ft.optim.sharded_state import FACTS
from subnet_ft.training.saving import FORMAT, MANIFEST, digests, remove
from subnet_ft.training.sharded_checkpoints import OPTIMIZER, SCHEDULER, is_in_parts
from subnet_ft.training.snapshots import SNAPSHOTS, Snapshots

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-\d+")  # as transformers has it


class NoSaveAtTheEnd(TrainerCallback):
    """Keeps the trainer from saving after its last step, where the whole model is saved anyway."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Take back a save at the last step."""
        if state.global_step >= state.max_steps:
            control.should_save = False
        return control

    on_epoch_end = on_step_end


class StopAfter(TrainerCallback):
    """Ends training after a step of the schedule as it is, and saves a checkpoint there.

    Args:
        step: The last step, >= 1.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for the save and the stop."""
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True
        return control


def newest_complete(folder: Path) -> Path | None:
    """Return the newest checkpoint in a run's folder that is whole; those that are not are named in the log."""
    for path in sorted(_checkpoints(folder), key=_step, reverse=True):
        problem = _problem(path)
        if problem is None:
            return path
        logger.warning("not resuming from `%s`: %s", path, problem)
    return None


def problems(folder: Path) -> str:
    """Say why a run's folder has no checkpoint that is whole."""
    found = [f"`{path.name}`: {_problem(path)}" for path in sorted(_checkpoints(folder), key=_step)]
    return "; ".join(found) or "it has no checkpoint"


def read_manifest(checkpoint: Path, *, is_whole: bool = False) -> dict[str, Any]:
    """Return what a checkpoint says about itself.

    Args:
        checkpoint: Its folder.
        is_whole: It was found by `newest_complete`, and its files need not be read again.

    Raises:
        CheckpointError: It is not whole, or a restricted trainer did not write it.
    """
    problem = None if is_whole else _problem(checkpoint)
    if problem is not None:
        other = newest_complete(checkpoint.parent)
        instead = f"`{other}` is whole." if other is not None else "No checkpoint beside it is whole: start again."
        raise CheckpointError(f"Cannot resume from `{checkpoint}`: {problem}. {instead}")
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
    return manifest


def trained_epochs(checkpoint: Path) -> int:
    """Return how many epochs a checkpoint has finished."""
    return int(json.loads((checkpoint / _STATE).read_text())["epoch"])


def replayed(sampler: Any, epochs: int) -> Any:
    """Bring a sampler of prompts to where the interrupted run had it.

    TRL's has a generator of its own that moves on once per epoch, and a new process starts it anew; so the orders of
    the finished epochs are drawn again and thrown away. Other samplers are left as they are.
    """
    if type(sampler).__name__ == "RepeatSampler" and sampler.shuffle:
        for _ in range(epochs):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
    return sampler


def remove_checkpoints(folder: Path, *, since: int = 0) -> None:
    """Remove the trainer checkpoints of a run, those of step `since` and later; the logs of `report_to` stay.

    With all of them go the bitmaps of its dynamics, which only a run that resumes needs.
    """
    for path in _checkpoints(folder):
        if _step(path) >= since:
            remove(path)
    if since == 0:
        Snapshots(folder / SNAPSHOTS).remove()


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _check_facts(manifest: dict[str, Any]) -> None:
    """Raise TypeError or KeyError where a fact is missing or of another type."""
    kinds_of: dict[str, Any] = {
        "global_step": int, "num_processes": int, "mask_fingerprint": str, "base_fingerprints": dict, "weights": str,
    }  # fmt: skip
    for key, kinds in kinds_of.items():
        if not isinstance(manifest[key], kinds):
            raise TypeError(f"`{key}` is {manifest[key]!r}")


def _problem(path: Path) -> str | None:
    """Say why a checkpoint cannot be resumed from, or `None` where it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"its `{MANIFEST}` has format {manifest['format']}, this release reads {FORMAT}"
        expected = {str(name): str(digest) for name, digest in manifest["files"].items()}
        _check_facts(manifest)
    except FileNotFoundError:
        return f"it has no `{MANIFEST}`, so it was not written by a restricted trainer, or not to its end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its `{MANIFEST}` cannot be read ({type(error).__name__}: {error})"
    missing = [name for name in expected if not (path / name).is_file()]
    if missing:
        return f"`{missing[0]}` is missing"
    found = {str(file.relative_to(path)): digest for file, digest in digests(path).items()}
    changed = [name for name, digest in expected.items() if found[name] != digest]
    if changed:
        name = changed[0]
        return f"`{name}` is not as it was written (SHA-256 {found[name][:16]}, then {expected[name][:16]})"
    optimizer = f"{SHARDED}/{FACTS}" if is_in_parts(path) else OPTIMIZER
    needed = {optimizer, SCHEDULER, _STATE}
    missing = sorted(needed - expected.keys())
    return f"it was saved without `{missing[0]}` (`save_only_model`)" if missing else None
