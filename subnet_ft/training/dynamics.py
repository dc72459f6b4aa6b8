"""Which weights a run changes when, and what rounding keeps from changing, at one bit per weight and snapshot."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.errors import TrainerError
from subnet_ft.masks import by_canonical_name
from subnet_ft.optim import MaskedBase
from subnet_ft.optim.fused import FusedBase
from subnet_ft.optim.watching import StepWatch
from subnet_ft.training.snapshots import PIECE_BYTES, SNAPSHOTS, Snapshots, Taken, changed_weights, digest_of
from subnet_ft.training.unwrap import unwrapped

logger = logging.getLogger(__name__)

DYNAMICS = "dynamics.json"
"""File with the figures; `subnet_ft.evidence.dynamics.Dynamics` says what each of them is."""

FORMAT = 1
"""Version of the file."""


class TrainingDynamics(TrainerCallback):
    """Notes every so many steps which weights differ from the base, and at the end of training writes `dynamics.json`.

    A snapshot compares the weights with the base bit by bit; the base is read from its files, piece by piece, and no
    weight is copied to compare with later. What is kept is one bit per weight and snapshot, on the disk. With
    `every=1` nothing is missed: a weight leaves the base's bits in the very step that first writes to it. With larger
    steps all figures are exact for what the snapshots saw; a weight that came back in between counts as never changed.

    The step that a snapshot ends is watched (see `StepWatch`): the optimizer then updates slices of tensors one after
    another, to the same bits, and the float32 value of every weight in a slice is compared before and after. What the
    change of that value would do to the stored weight alone is what training without masters would lose in this step.
    That needs `MaskedAdamW` or `MaskedSGD` and a rounding that is not stochastic; other runs get all the other figures,
    and `missing` in the file says why those are absent.

    A run that is killed and resumed ends with the same figures: snapshots beyond the checkpoint it resumes from are
    taken again. Add it to a restricted trainer with `add_callback`. Of several processes the first writes.

    Args:
        base: Where the run starts: the checkpoint that the model was loaded from, or its folder or name.
        every: Steps from one snapshot to the next, >= 1. The last step is always one.
        file: Where the figures go; `dynamics.json` in the trainer's `output_dir` when `None`.
        keep_bitmaps: Leave the folder `dynamics` with the bitmaps in `output_dir` when the run is through. Without them
            a finished run cannot be resumed from an earlier checkpoint and have its figures.

    Raises:
        ValueError: `every` is not positive.
    """

    def __init__(
        self,
        base: str | Path | Checkpoint,
        every: int,
        *,
        file: str | Path | None = None,
        keep_bitmaps: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"`every` must be >= 1, got {every}")
        self.base = base if isinstance(base, Checkpoint) else open_checkpoint(base)
        self.every = every
        self.file = None if file is None else Path(file)
        self.keep_bitmaps = keep_bitmaps
        self._digest = ""
        self._is_over = False
        self._watched: StepWatch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the run starts from the base, or that a resumed one has the snapshots of its first part."""
        unwrapped(kwargs["optimizer"])  # raises where it is none of ours
        snapshots = self._snapshots(args)
        self._watched, self._is_over = None, False
        if not state.is_world_process_zero:
            return
        self._digest, other = digest_of(self.base, _weights(kwargs["model"]))
        if state.global_step == 0:
            if other is not None:
                raise TrainerError(
                    f"The run does not start from `{self.base.name}`: `{other}` has other weights. Pass the checkpoint "
                    "that the model was loaded from, and train from there."
                )
            snapshots.remove()
            self._path(args).unlink(missing_ok=True)
            return
        if state.global_step >= state.max_steps and not snapshots.steps() and self._path(args).is_file():
            self._is_over = True
            return
        # One at the end of a shorter run would not be there if that run had been as long as this one.
        due = {step for step in range(1, state.global_step + 1) if self._is_due(step, state)}
        self._check_first_part(snapshots, due)
        snapshots.keep(due)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch the step that a snapshot will end."""
        optimizer = unwrapped(kwargs["optimizer"])
        is_due = state.is_world_process_zero and self._is_due(state.global_step + 1, state)
        if is_due and isinstance(optimizer, FusedBase) and not _missing(optimizer):
            self._watched = optimizer.watch = StepWatch()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the optimizer go on unwatched."""
        optimizer = unwrapped(kwargs["optimizer"])
        if isinstance(optimizer, FusedBase):
            optimizer.watch = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take a snapshot every so many steps and after the last, before anything of that step is saved."""
        if state.is_world_process_zero and self._is_due(state.global_step, state):
            self._take(args, state, kwargs)
        self._watched = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the figures, and remove the bitmaps of a run that is through."""
        if not state.is_world_process_zero or self._is_over or state.global_step == 0:
            return
        snapshots = self._snapshots(args)
        if state.global_step not in snapshots.steps():
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                logger.warning("the model is not that of the last step: the last snapshot stands for the run's end")
            else:
                self._take(args, state, kwargs)  # training was stopped early, and nobody watched this step
        if not snapshots.steps():
            return
        optimizer = unwrapped(kwargs["optimizer"])
        _write(self._path(args), _figures(snapshots, optimizer))
        if state.global_step >= state.max_steps and not self.keep_bitmaps:
            snapshots.remove()

    def _take(self, args: TrainingArguments, state: TrainerState, event: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        weights, mask = _weights(event["model"]), unwrapped(event["optimizer"]).mask
        changed = changed_weights(self.base, weights)
        watched = self._watched
        bits = sum(tensor.bits.nbytes for tensor in changed.values())
        taken = Taken(
            step=state.global_step,
            every=self.every,
            base=self._digest,
            num_parameters=sum(tensor.num_elements for tensor in changed.values()),
            num_trainable=mask.num_trainable,
            num_updates=None if watched is None else watched.num_updates,
            num_changed=None if watched is None else watched.num_changed,
            num_kept_back=None if watched is None else watched.num_kept_back,
            num_rounded_away=None if watched is None else watched.num_rounded_away,
            bitmap_bytes=bits,
            seconds=time.perf_counter() - start + (0.0 if watched is None else watched.seconds),
            # safetensors copies what it writes.
            peak_bytes=max(bits + PIECE_BYTES, 2 * bits, 0 if watched is None else watched.peak_bytes),
        )
        self._snapshots(args).write(taken, changed)
        count = sum(tensor.count for tensor in changed.values())
        logger.debug("step %d: %d of %d weights differ from the base", taken.step, count, taken.num_parameters)

    def _is_due(self, step: int, state: TrainerState) -> bool:
        return step % self.every == 0 or step >= state.max_steps

    def _check_first_part(self, snapshots: Snapshots, due: set[int]) -> None:
        """Raise TrainerError unless the snapshots of all these steps are there, and of this base."""
        lost = sorted(due.difference(snapshots.steps()))
        if lost:
            raise TrainerError(
                f"`{snapshots.folder}` has no snapshot of step {lost[0]}, which the run has passed, so its dynamics "
                "are not known. Resume with the `every` that it was started with, and with the folder that was there; "
                "bitmaps are removed at the end of a run unless `keep_bitmaps` is on. Or resume without this callback "
                "(`evidence.dynamics_steps: null` in a recipe)."
            )
        for step in sorted(due):
            taken = snapshots.taken(step)
            if taken.every != self.every or taken.base != self._digest:
                raise TrainerError(
                    f"The snapshot of step {step} in `{snapshots.folder}` was taken with `every={taken.every}` and "
                    f"base {taken.base[:16]}, this run has `every={self.every}` and base {self._digest[:16]} "
                    f"(`{self.base.name}`). Resume with the callback that the run was started with."
                )

    def _snapshots(self, args: TrainingArguments) -> Snapshots:
        return Snapshots(Path(str(args.output_dir)) / SNAPSHOTS)

    def _path(self, args: TrainingArguments) -> Path:
        return Path(str(args.output_dir)) / DYNAMICS if self.file is None else self.file


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in by_canonical_name(model.named_parameters()).items()}


def _stored_in_bfloat16(optimizer: MaskedBase) -> bool:
    """Whether any trained weight is."""
    return any(weight.dtype == torch.bfloat16 for group in optimizer.param_groups for weight in group["params"])


def _missing(optimizer: MaskedBase) -> str:
    """Say why a step of this optimizer cannot be watched; empty where it can."""
    if not isinstance(optimizer, FusedBase):
        kind = optimizer.param_groups[0].get("optimizer_class", type(optimizer).__name__)
        return (
            f"`{kind}` updates all tensors in a step of its own, so that nothing is seen of a weight before and after; "
            "MaskedAdamW and MaskedSGD can be watched"
        )
    if optimizer.master == "stochastic" and _stored_in_bfloat16(optimizer):
        return "weights are rounded stochastically, and no float32 value of a weight outlives its step"
    return ""


def _figures(snapshots: Snapshots, optimizer: MaskedBase) -> dict[str, Any]:
    """Return the fields of `subnet_ft.evidence.dynamics.Dynamics`."""
    start = time.perf_counter()
    seen = list(snapshots.walk())
    last, at_end = seen[-1]
    num_parameters, final, ever = last.num_parameters, at_end.now, at_end.ever
    has_masters = not (
        isinstance(optimizer, FusedBase) and optimizer.master == "none" and _stored_in_bfloat16(optimizer)
    )
    return {
        "every": last.every,
        "steps": [taken.step for taken, _ in seen],
        "num_parameters": num_parameters,
        "num_trainable": last.num_trainable,
        "never": (num_parameters - ever) / num_parameters,
        "cancelled": (ever - final) / num_parameters,
        "final": final / num_parameters,
        "density": [counts.now / num_parameters for _, counts in seen],
        "ever": [counts.ever / num_parameters for _, counts in seen],
        "recall": [_share(counts.now_and_final, final) for _, counts in seen],
        "coverage": [_share(counts.now_and_final, counts.now) for _, counts in seen],
        "jaccard": [None, *(_share(counts.now_and_before, counts.now_or_before) for _, counts in seen[1:])],
        "num_updates": [taken.num_updates for taken, _ in seen],
        "changed_in_step": [_share(taken.num_changed, num_parameters) for taken, _ in seen],
        "lost_with_masters": [
            _share(taken.num_kept_back, taken.num_updates) if has_masters else None for taken, _ in seen
        ],
        "lost_without_masters": [_share(taken.num_rounded_away, taken.num_updates) for taken, _ in seen],
        "missing": _missing(optimizer),
        "seconds": sum(taken.seconds for taken, _ in seen) + time.perf_counter() - start,
        "peak_bytes": max(taken.peak_bytes for taken, _ in seen),
        "disk_bytes": sum(taken.bitmap_bytes for taken, _ in seen),
    }


def _share(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def _write(path: Path, figures: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps({"format": FORMAT, **figures}, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
