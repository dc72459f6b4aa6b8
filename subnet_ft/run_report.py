"""The report of a finished run, from what its stages left in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import subnet_ft
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.evidence.report import Report, RunEvidence, build_report
from subnet_ft.evidence.weights import RunWeights, compare_weights
from subnet_ft.inputs import RunInputs
from subnet_ft.recipe import recipe_to_dict
from subnet_ft.stages import read_json
from subnet_ft.trained_runs import TrainedRuns
from subnet_ft.training.run import LOG
from subnet_ft.verification import compare_dtype


def run_report(
    inputs: RunInputs,
    folder: Path,
    runs: TrainedRuns,
    records: Mapping[str, list[dict[str, Any]] | None],
    *,
    not_measured: Sequence[str] = (),
) -> Report:
    """Compare the weights of a run's models and judge them.

    Args:
        inputs: The recipe with its base.
        folder: The run's folder.
        runs: What was trained.
        records: What each of them and `base` answered, by name; `None` where evaluation is off.
        not_measured: Further sentences for the section of that name.
    """
    recipe, trained, subnet = inputs.recipe, runs.masked, runs.subnet
    weights = compare_weights(
        inputs.base,
        open_checkpoint(trained["full"].folder),
        {name: RunWeights(open_checkpoint(run.folder), run.mask) for name, run in trained.items() if name != "full"},
        dtype=compare_dtype(inputs.base, recipe),
    )

    def evidence(name: str) -> RunEvidence:
        run = trained[name]
        return RunEvidence(
            name,
            records=records[name],
            log_history=json.loads((run.folder / LOG).read_text()),
            seconds={"train": run.results["train_seconds"], **_evaluation_seconds(folder, name)},
            memory=run.results["memory"],
            weights=weights.get(name),
        )

    from_full = recipe.subnet.source.kind == "extract"
    mask_stage = read_json(folder / "mask" / "stage.json") if from_full else None
    return build_report(
        version=subnet_ft.__version__,
        base=RunEvidence("base", records=records["base"], seconds=_evaluation_seconds(folder, "base")),
        full=evidence("full"),
        subnet=evidence("subnet"),
        controls=[evidence(name) for name in trained if name not in ("full", "subnet")],
        mask=subnet.mask,
        mask_seconds=mask_stage["results"]["seconds"] if mask_stage else None,
        margin=recipe.evaluation.margin,
        confidence=recipe.evaluation.confidence,
        recipe=recipe_to_dict(recipe),
        environment=trained["full"].results["environment"],
        seeds=[recipe.seed],
        not_measured=[
            *not_measured,
            *(
                f"The whole training time of `{name}`: it was interrupted and resumed from "
                f"{run.results['resumed_from']}, and the time shown is that of the last part."
                for name, run in trained.items()
                if run.results["resumed_from"]
            ),
        ],
    )


def _evaluation_seconds(folder: Path, name: str) -> dict[str, float]:
    stage = read_json(folder / "evaluation" / name / "stage.json")
    return {"evaluate": stage["results"]["seconds"]} if stage else {}
