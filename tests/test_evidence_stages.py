"""The evidence of a whole run on a tiny model: every piece there, none made twice, each from the right models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import recipe

from subnet_ft.evidence.report import Report
from subnet_ft.evidence_stages.stage import EvidenceFolder
from subnet_ft.pipeline import Pipeline

ASKED = [
    "baselines=[lora]", "controls=[uniform, magnitude_matched]", "repeats={seeds: [1], runs: subnet}",
    "evidence={spectra: sampled, dynamics_steps: 2}", "evaluation.agreement_prompts=10",
    "evaluation.retention={tasks: [{name: reasoning_gym/chain_sum, num_eval: 5}], max_new_tokens: 3, max_tokens: 60}",
    "methods={lora: {config: {r: 2}}}",
]  # fmt: skip
MODELS = {"base", "subnet", "control-uniform", "control-magnitude_matched", "lora"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("runs") / "grpo"
    return folder, Pipeline(recipe("grpo", folder, *ASKED)).run()


def test_report_holds_every_piece_of_evidence(run: tuple[Path, Report]) -> None:
    _, report = run
    assert {entry.first for entry in report.overlaps} | {entry.second for entry in report.overlaps} == {
        "subnet", "control-uniform", "control-magnitude_matched", "seed-1/subnet",
    }  # fmt: skip
    assert report.structure is not None
    assert report.structure.control is not None
    assert report.spectra is not None
    assert report.spectra.sampled
    assert set(report.dynamics) == {"full", "subnet", "control-uniform", "control-magnitude_matched"}
    assert set(report.agreement) == MODELS
    assert set(report.retention) == {"full", *MODELS}
    assert report.floor is not None
    assert report.floor.seeds == (0, 1)
    assert [entry.run for entry in report.seeds_summary] == ["subnet"]
    assert report.scatter is not None
    assert report.baselines == ["lora"]
    assert {"lora", *MODELS} <= set(report.accuracy)


def test_report_survives_its_file(run: tuple[Path, Report]) -> None:
    folder, report = run
    assert Report.from_dict(json.loads((folder / "report.json").read_text())) == report


def test_evidence_is_not_made_twice(run: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, report = run

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a finished piece of evidence was made again")

    for name in ("overlap_matrix", "mask_structure", "delta_spectra", "weight_scatter", "floor"):
        monkeypatch.setattr(f"subnet_ft.evidence_stages.weights.{name}", never)
    for name in ("agreement", "retention"):
        monkeypatch.setattr(f"subnet_ft.evidence_stages.outputs.{name}", never)
    again = Pipeline(recipe("grpo", folder, *ASKED)).run()
    assert dataclasses.replace(again, environment={}) == dataclasses.replace(report, environment={})


def test_evidence_of_other_prompts_is_made_again(run: tuple[Path, Report]) -> None:
    folder, report = run
    asked = [entry.replace("agreement_prompts=10", "agreement_prompts=7") for entry in ASKED]
    again = Pipeline(recipe("grpo", folder, *asked)).run()
    assert {entry.num_prompts for entry in report.agreement.values()} == {10}
    assert {entry.num_prompts for entry in again.agreement.values()} == {7}
    Pipeline(recipe("grpo", folder, *ASKED)).run()  # as the other tests want it


def test_retention_of_the_base_is_its_own_yardstick(run: tuple[Path, Report]) -> None:
    _, report = run
    assert report.retention["base"].kl_to_base is None
    assert all(entry.kl_to_base is not None for name, entry in report.retention.items() if name != "base")
    assert {len(entry.tasks["reasoning_gym/chain_sum"].correct) for entry in report.retention.values()} == {5}


def test_run_without_requests_measures_what_is_cheap(tmp_path: Path) -> None:
    quiet = ["controls=[]", "evidence.spectra=none", "evaluation.agreement_prompts=0"]
    report = Pipeline(recipe("grpo", tmp_path / "run", *quiet)).run()
    assert (report.overlaps, report.spectra, report.agreement, report.retention) == ([], None, {}, {})
    assert (report.floor, report.seeds_summary, report.dynamics) == (None, [], {})
    assert report.structure is not None
    names = " ".join(report.not_measured)
    assert "floor" in names


def test_train_under_a_probed_mask_counts_the_probe(tmp_path: Path) -> None:
    source = "subnet.source={kind: early, steps: 2, criterion: absolute, tolerance: 0.0005}"
    report = Pipeline(recipe("grpo", tmp_path / "run", source, "controls=[]", "evaluation.agreement_prompts=0")).run()
    (cost,) = (entry for entry in report.costs if entry.run == "subnet")
    assert cost.needs == "probe"
    assert cost.first_seconds is not None
    assert cost.train_seconds is not None
    assert cost.first_seconds > cost.train_seconds


def test_evidence_of_another_version_is_made_again(tmp_path: Path) -> None:
    """Fields change between versions; what an older one left is not read as if it were ours."""

    @dataclasses.dataclass(frozen=True)
    class Older:
        """What was found."""

        share: float
        """A share."""

    @dataclasses.dataclass(frozen=True)
    class Newer:
        """What is found."""

        share: float
        """A share."""
        count: int
        """What it is a share of."""

    folder = EvidenceFolder(tmp_path, overwrite=False)
    assert folder.once("piece", Older, {"a": 1}, lambda: Older(0.5), version=1) == Older(0.5)
    assert folder.once("piece", Older, {"a": 1}, lambda: Older(1.0), version=1) == Older(0.5)
    assert folder.once("piece", Newer, {"a": 1}, lambda: Newer(0.5, 3), version=1) == Newer(0.5, 3)
    assert folder.once("piece", Newer, {"a": 1}, lambda: Newer(0.7, 3), version=2) == Newer(0.7, 3)


def test_report_says_when_runs_were_measured_under_other_conditions(run: tuple[Path, Report]) -> None:
    folder, report = run
    assert not [line for line in report.not_measured if "same conditions" in line]
    path = folder / "control-uniform" / "stage.json"
    before = path.read_text()
    stage = json.loads(before)
    stage["results"]["environment"]["torch_threads"] = 64
    path.write_text(json.dumps(stage))
    try:
        again = Pipeline(recipe("grpo", folder, *ASKED)).run()
    finally:
        path.write_text(before)
    (line,) = [line for line in again.not_measured if "same conditions" in line]
    assert "64 for control-uniform" in line
