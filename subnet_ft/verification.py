"""Judging checkpoints that already exist, without a run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import subnet_ft
from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.environment import environment
from subnet_ft.evidence.report import Report, RunEvidence, build_report, write_report
from subnet_ft.evidence.weights import RunWeights, compare_weights
from subnet_ft.held_out import held_out, judge
from subnet_ft.inputs import RunInputs
from subnet_ft.masks import SubnetMask
from subnet_ft.recipe import Recipe, recipe_to_dict


def compare_dtype(base: Checkpoint, recipe: Recipe) -> str | None:
    """Return the dtype in which runs of `recipe` are compared with their base; `None` when it is stored in that one."""
    stored = {str(spec.dtype).removeprefix("torch.") for spec in base.specs.values()}
    return None if stored == {recipe.model.dtype} else recipe.model.dtype


def verify(
    base: str,
    full: str,
    subnet: str,
    mask_path: str | Path,
    *,
    recipe: Recipe | None = None,
    output: str | Path | None = None,
    progress: bool = False,
) -> Report:
    """Judge three existing checkpoints; accuracy is measured when a recipe says on what.

    Args:
        base: Folder or name of the base checkpoint.
        full: The full run's checkpoint.
        subnet: The subnetwork run's checkpoint.
        mask_path: The mask that the subnetwork run trained under.
        recipe: Gives the held-out prompts, the margin and the confidence.
        output: Folder for the report's files, if they are wanted.
        progress: Show progress bars on stderr.
    """
    checkpoints = {name: open_checkpoint(model) for name, model in (("base", base), ("full", full), ("subnet", subnet))}
    mask = SubnetMask.load(mask_path, base=checkpoints["base"])
    weights = compare_weights(
        checkpoints["base"],
        checkpoints["full"],
        {"subnet": RunWeights(checkpoints["subnet"], mask)},
        dtype=mask.provenance.compare_dtype,
    )
    records: dict[str, list[dict[str, Any]]] = {}
    if recipe is not None and recipe.evaluation.enabled:
        inputs = RunInputs(recipe)
        judged_on = held_out(inputs, progress=progress)
        assert judged_on is not None
        for name, checkpoint in checkpoints.items():
            records[name] = judge(checkpoint.folder, inputs, judged_on, progress=progress)
    report = build_report(
        version=subnet_ft.__version__,
        base=RunEvidence("base", records=records.get("base")),
        full=RunEvidence("full", records=records.get("full")),
        subnet=RunEvidence("subnet", records=records.get("subnet"), weights=weights["subnet"]),
        mask=mask,
        margin=recipe.evaluation.margin if recipe else 0.02,
        confidence=recipe.evaluation.confidence if recipe else 0.95,
        recipe=recipe_to_dict(recipe) if recipe else None,
        environment=environment(),
        seeds=[recipe.seed] if recipe else [],
        title=f"{subnet} against {full}",
    )
    if output is not None:
        write_report(report, output)
    return report


def has_failed(report: Report) -> bool:
    """Tell whether a report fails: the full run was not recovered, or a weight outside a mask changed."""
    return report.verdict == "not_recovered" or any(entry.off_mask_changed for entry in report.weights.values())
