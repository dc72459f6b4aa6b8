"""The report of a finished run, from what its stages left in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import subnet_ft
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.evidence.report import Report, RunEvidence, build_report
from subnet_ft.evidence.weights import RunWeights, compare_weights
from subnet_ft.inputs import RunInputs
from subnet_ft.recipe import recipe_to_dict
from subnet_ft.stages import TrainedStage, read_json
from subnet_ft.training.run import LOG
from subnet_ft.verification import compare_dtype


@dataclass(frozen=True)
class Runs:
    """The trained stages of a run.

    Args:
        full: The full run.
        subnet: The subnetwork run.
        controls: Name to control, such as `control-uniform`.
        baselines: Method to its run.
        repeats: Seed to what was repeated with it, under the names of the first seed's stages.
    """

    full: TrainedStage
    subnet: TrainedStage
    controls: Mapping[str, TrainedStage] = field(default_factory=dict)
    baselines: Mapping[str, TrainedStage] = field(default_factory=dict)
    repeats: Mapping[int, Mapping[str, TrainedStage]] = field(default_factory=dict)

    @property
    def masked(self) -> dict[str, TrainedStage]:
        """Full run, subnetwork run and controls, by name."""
        return {"full": self.full, "subnet": self.subnet, **self.controls}

    @property
    def all(self) -> dict[str, TrainedStage]:
        """Every run by its name; a repeated one has the seed's folder before it, as in `seed-1/full`."""
        repeated = {f"seed-{seed}/{name}": run for seed, stages in self.repeats.items() for name, run in stages.items()}
        return {**self.masked, **self.baselines, **repeated}


def run_report(
    inputs: RunInputs,
    folder: Path,
    runs: Runs,
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
