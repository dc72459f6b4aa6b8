"""The stage `base`: the model of a recipe with the head that its algorithm adds, made once for all runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from subnet_ft.checkpoints.models import save_with_reward_head
from subnet_ft.digests import checkpoint_sha256
from subnet_ft.errors import StageError
from subnet_ft.inputs import BASE, RunInputs
from subnet_ft.processes import first_alone
from subnet_ft.recipe.methods import METHODS
from subnet_ft.stages import FINISHED, STARTED, run_stage

logger = logging.getLogger(__name__)


def make_base(inputs: RunInputs, folder: Path, *, overwrite: bool) -> None:
    """Save the base in the run's folder, unless it is there; nothing to do where the recipe's model is the base.

    Args:
        inputs: The recipe with its model.
        folder: The run's folder.
        overwrite: Replace a base that was made with other settings, and that runs have started from.

    Raises:
        StageError: The base was made with other settings, or is not the one that the stage saved.
    """
    if not inputs.has_new_head:
        return
    stage, recipe = folder / BASE, inputs.recipe

    def work(into: Path) -> dict[str, Any]:
        save_with_reward_head(inputs.language_model.folder, into, dtype=recipe.model.dtype, seed=recipe.seed)
        return {"sha256": checkpoint_sha256(into)}

    logger.info("base: %s with a new head of one output", recipe.model.name)
    # Once a run has started from it, it belongs to that run and is not replaced without being asked.
    cheap = not _has_trained(folder)
    weights = stage / "config.json"
    results = run_stage(stage, inputs.of_base(), work, overwrite=overwrite, cheap=cheap, products=[weights])
    if first_alone("digest of the base", lambda: checkpoint_sha256(stage)) != results["sha256"]:
        raise StageError(
            f"The checkpoint in `{stage}` is not the one that this stage saved. Remove the folder to make it again."
        )


def _has_trained(folder: Path) -> bool:
    """Tell whether a run's folder holds a training stage, finished or not, of this seed or of a repeated one."""
    names = (*METHODS, "control-*", "probe-*")
    stages = (stage for within in (folder, *folder.glob("seed-*")) for name in names for stage in within.glob(name))
    return any((stage / file).is_file() for stage in stages for file in (FINISHED, STARTED))
