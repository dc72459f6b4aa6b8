"""The delta beside a finished subnetwork run: what was trained as a patch of its base, made once."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from subnet_ft.checkpoints import Checkpoint
from subnet_ft.deltas import DeltaFile, export_delta
from subnet_ft.deltas.header import SUFFIX
from subnet_ft.deltas.writing import remove_unfinished
from subnet_ft.errors import DeltaFileError, DeltaMismatchError, StageError
from subnet_ft.processes import first_alone
from subnet_ft.stages import TrainedStage, add_result

logger = logging.getLogger(__name__)

RESULT = "delta"
"""Its key among the results of the stage."""


def delta_path(stage: Path) -> Path:
    """Return where the delta of a stage goes: beside its folder, of which others load every safetensors as weights."""
    return stage.with_name(f"{stage.name}{SUFFIX}")


def with_delta(stage: TrainedStage, base: Checkpoint, *, progress: bool = False) -> TrainedStage:
    """Write the delta of a finished stage, unless it is there, and add its figures to the stage's results.

    It holds the weights of the mask, and is written only where no other weight changed. Where there can be none, as
    with a base in another dtype, the results say why: the checkpoint is as good without it.

    Args:
        stage: A finished stage under a mask, its checkpoint compared with what the stage saved.
        base: What it was trained from.
        progress: Show a bar on stderr.

    Raises:
        StageError: Another file has taken the delta's place.
        DeltaFileError: The file cannot be written.
    """
    path, name = delta_path(stage.folder), stage.folder.name

    def make() -> dict[str, Any]:
        known: dict[str, Any] | None = stage.results.get(RESULT)
        if known is not None and ("missing" in known or path.exists()):
            if "missing" not in known and _sha256(path) != known["sha256"]:
                raise StageError(f"`{path}` is not the delta that this run made. Remove it to have it made again.")
            return known
        remove_unfinished(path)  # of a run that was killed; this one alone works in the folder
        try:
            file = export_delta(base, stage.folder, path, mask=stage.mask, progress=progress)
        except DeltaMismatchError as error:
            logger.warning("%s: no delta beside it: %s", name, error)
            found: dict[str, Any] = {"missing": str(error)}
        else:
            found = _figures(file, stage.folder)
            logger.info("%s: %s, %.1f %% of the checkpoint", name, path, 100 * found["bytes"] / found["dense_bytes"])
        add_result(stage.folder, RESULT, found)
        return found

    found = first_alone(f"delta of {name}", make)
    return dataclasses.replace(stage, results={**stage.results, RESULT: found})


def _figures(file: DeltaFile, checkpoint: Path) -> dict[str, Any]:
    return {
        "bytes": file.nbytes,
        "dense_bytes": sum(weights.stat().st_size for weights in checkpoint.glob("*.safetensors")),
        "density": file.density,
        "sha256": file.sha256,
    }


def _sha256(path: Path) -> str | None:
    try:
        return DeltaFile(path).sha256
    except DeltaFileError:  # damaged, or something else of that name
        return None
