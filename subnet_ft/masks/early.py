"""The early mask: what the first steps of a full run changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.errors import MaskError
from subnet_ft.masks.extraction import extract
from subnet_ft.masks.mask import SubnetMask


def early_mask(
    base: str | Path | Checkpoint,
    tuned: str | Path | Checkpoint,
    *,
    criterion: str = "exact",
    tolerance: float = 0.0,
    dtype: str | None = None,
    progress: bool = False,
) -> SubnetMask:
    """Compare a base with a trainer's checkpoint, and record the step at which that was saved.

    Args:
        base: The checkpoint before training.
        tuned: A folder that a trainer saved in the course of a run, `checkpoint-STEP`.
        criterion: As in `extract`, like all that follow.
        tolerance: Of the criterion.
        dtype: Cast both to it first.
        progress: Show a progress bar on standard error.

    Raises:
        MaskError: The folder does not say its step, or an argument is invalid.
        CheckpointError: A checkpoint cannot be read, or the two cannot be compared.
    """
    after = tuned if isinstance(tuned, Checkpoint) else open_checkpoint(tuned)
    step = _step(after.folder)
    mask = extract(base, after, criterion=criterion, tolerance=tolerance, dtype=dtype, progress=progress)
    return SubnetMask(mask.tensors, replace(mask.provenance, source={"kind": "early", "step": step}))


def _step(folder: Path) -> int:
    path = folder / "trainer_state.json"
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MaskError(
            f"`{folder}` does not say after how many steps it was saved: `{path.name}` is missing or has no "
            "`global_step`. Name a `checkpoint-STEP` folder of a run, or compare the two with `subnet-ft extract`."
        ) from error
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        raise MaskError(f"`{path}` gives {step!r} as its `global_step`, expected a whole number >= 1.")
    return step
