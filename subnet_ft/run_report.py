"""The report of a finished run, from what its stages left in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import subnet_ft
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.delta_stage import RESULT
from subnet_ft.evidence.conditions import differing_conditions
from subnet_ft.evidence.report import DeltaSize, Report, RunEvidence, build_report
from subnet_ft.evidence.weights import RunWeights, compare_weights
from subnet_ft.evidence_stages import OutputEvidence, WeightEvidence, over_seeds
from subnet_ft.evidence_stages.stage import EvidenceFolder
from subnet_ft.inputs import RunInputs
from subnet_ft.recipe import recipe_to_dict
from subnet_ft.stages import TrainedStage, read_json
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
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Compare the weights of a run's models, gather the evidence beside them, and judge.

    Args:
        inputs: The recipe with its base.
        folder: The run's folder.
        runs: What was trained.
        records: What each of them and `base` answered, by name; `None` where evaluation is off.
        not_measured: Further sentences for the section of that name.
        overwrite: Passed on to the stages of evidence, all of which are cheap.
        progress: Show progress bars on stderr.
    """
    recipe, subnet = inputs.recipe, runs.subnet
    weights = compare_weights(
        inputs.base,
        open_checkpoint(runs.full.folder),
        {
            name: RunWeights(open_checkpoint(run.folder), run.mask)
            for name, run in runs.masked.items()
            if name != "full"
        },
        dtype=compare_dtype(inputs.base, recipe),
    )

    def evidence(name: str, run: TrainedStage) -> RunEvidence:
        return RunEvidence(
            name,
            records=records.get(name),
            log_history=json.loads((run.folder / LOG).read_text()),
            seconds={"train": run.results["train_seconds"], **_evaluation_seconds(folder, name)},
            memory=run.results["memory"],
            resumed_from=run.results["resumed_from"],
            weights=weights.get(name),
        )

    into = EvidenceFolder(folder, overwrite)
    of_weights = WeightEvidence(inputs, runs, into, progress=progress)
    of_outputs = OutputEvidence(inputs, runs, into, progress=progress)
    mask_stage = read_json(folder / "mask" / "stage.json") if recipe.subnet.source.kind != "file" else None
    return build_report(
        version=subnet_ft.__version__,
        base=RunEvidence("base", records=records["base"], seconds=_evaluation_seconds(folder, "base")),
        full=evidence("full", runs.full),
        subnet=evidence("subnet", subnet),
        controls=[evidence(name, run) for name, run in runs.controls.items()],
        baselines=[evidence(name, run) for name, run in runs.baselines.items()],
        probe=None if runs.probe is None else evidence("probe", runs.probe),
        mask=subnet.mask,
        mask_seconds=mask_stage["results"]["seconds"] if mask_stage else None,
        margin=recipe.evaluation.margin,
        confidence=recipe.evaluation.confidence,
        recipe=recipe_to_dict(recipe),
        environment=runs.full.results["environment"],
        seeds=[recipe.seed, *runs.repeats],
        overlaps=of_weights.overlaps(),
        structure=of_weights.structure(),
        spectra=of_weights.spectra(),
        dynamics=of_weights.dynamics(),
        agreement=of_outputs.agreement(records),
        retention=of_outputs.retention(),
        floor=of_weights.floor(records),
        seeds_summary=over_seeds(recipe, runs, records),
        scatter=of_weights.scatter(),
        delta=delta_size(subnet),
        not_measured=[
            *not_measured,
            *cost_gaps(runs),
            *delta_gaps(subnet),
        ],
    )


def delta_size(run: TrainedStage) -> DeltaSize | None:
    """Return what the delta of a run takes; `None` where there is none."""
    found = run.results.get(RESULT, {"missing": ""})
    return None if "missing" in found else DeltaSize(**found)


def delta_gaps(run: TrainedStage) -> list[str]:
    """Say why a run has no delta."""
    why = run.results.get(RESULT, {}).get("missing")
    return [] if why is None else [f"The size of the subnetwork as a delta, as there is none: {why}"]


def cost_gaps(runs: TrainedRuns) -> list[str]:
    """Say which times and peaks of a run's stages do not compare, or are not of the whole training."""
    environments = {name: run.results["environment"] for name, run in runs.all.items()}
    return [
        *(
            f"Times and memory under the same conditions: `{key}` is {_values(values)}."
            for key, values in differing_conditions(environments).items()
        ),
        *(
            f"The whole training time of `{name}`: it was interrupted and resumed from "
            f"{run.results['resumed_from']}, and the time shown is that of the last part."
            for name, run in runs.all.items()
            if run.results["resumed_from"]
        ),
    ]


def _evaluation_seconds(folder: Path, name: str) -> dict[str, float]:
    stage = read_json(folder / "evaluation" / name / "stage.json")
    return {"evaluate": stage["results"]["seconds"]} if stage else {}


def _values(by_run: Mapping[str, Any]) -> str:
    """Say which runs have which value."""
    runs: dict[str, list[str]] = {}
    for name, value in by_run.items():
        runs.setdefault(str(value), []).append(name)
    return ", ".join(f"{value} for {' and '.join(names)}" for value, names in runs.items())
