"""Evidence from masks and weights: of which masks and runs, and what makes a piece of it out of date."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from report_evidence import full_report
from test_pipeline import recipe

from subnet_ft.evidence.dynamics import DYNAMICS, FORMAT
from subnet_ft.evidence_stages import WeightEvidence, weights
from subnet_ft.evidence_stages.stage import EvidenceFolder
from subnet_ft.inputs import RunInputs
from subnet_ft.masks import SubnetMask, base_mask
from subnet_ft.stages import TrainedStage, write_json
from subnet_ft.trained_runs import TrainedRuns


def mask(seed: int) -> SubnetMask:
    return base_mask("tiny:llama", "uniform", density=0.3, seed=seed)


def stage(folder: Path, mask: SubnetMask | None = None) -> TrainedStage:
    return TrainedStage(folder, mask, {"sha256": folder.name})


def of_weights(
    folder: Path,
    *overrides: str,
    controls: Mapping[str, SubnetMask] | None = None,
    repeats: Mapping[int, SubnetMask | None] | None = None,
) -> WeightEvidence:
    """Return the evidence of a run whose subnetwork is `mask(0)`; of a repeat without a mask only the full run is."""
    repeated = {}
    for seed, found in (repeats or {}).items():
        repeated[seed] = {"full": stage(folder / f"seed-{seed}/full")}
        if found is not None:
            repeated[seed]["subnet"] = stage(folder / f"seed-{seed}/subnet", found)
    runs = TrainedRuns(
        stage(folder / "full"),
        stage(folder / "subnet", mask(0)),
        {name: stage(folder / name, found) for name, found in (controls or {}).items()},
        repeats=repeated,
    )
    into = EvidenceFolder(folder, overwrite=False)
    return WeightEvidence(RunInputs(recipe("grpo", folder, *overrides)), runs, into, progress=False)


def test_overlaps_compare_a_mask_that_several_runs_share_once(tmp_path: Path) -> None:
    """The repeats of a mask from a file train under that mask, which says nothing about two masks."""
    repeats = {1: mask(0), 2: mask(2), 3: mask(2), 4: None}
    found = of_weights(tmp_path / "a", controls={"control-uniform": mask(1)}, repeats=repeats).overlaps()
    assert [(entry.first, entry.second) for entry in found] == [
        ("subnet", "control-uniform"), ("subnet", "seed-2/subnet"), ("control-uniform", "seed-2/subnet"),
    ]  # fmt: skip
    assert of_weights(tmp_path / "b", repeats={1: mask(0), 2: mask(0)}).overlaps() == []


def test_structure_is_made_again_beside_another_control_or_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = weights.mask_structure

    def counted(*args: Any, **options: Any) -> Any:
        made.append(options["control"].fingerprint)
        return real(*args, **options)

    monkeypatch.setattr(weights, "mask_structure", counted)
    name = "control-magnitude_matched"
    for control in (mask(1), mask(1), mask(2)):
        of_weights(tmp_path, controls={name: control}).structure()
    assert made == [mask(1).fingerprint, mask(2).fingerprint]
    other = of_weights(tmp_path, controls={name: mask(2)})
    other.inputs.base_sha256 = "another base"
    other.structure()
    assert len(made) == 3


def test_structure_that_is_there_draws_no_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = of_weights(tmp_path).structure()
    monkeypatch.setattr(weights, "control_mask", None)
    assert of_weights(tmp_path).structure() == found


def _note_every_4(folder: Path) -> None:
    folder.mkdir(parents=True)
    write_json(folder / DYNAMICS, {"format": FORMAT, **vars(full_report().dynamics["full"])})


def test_dynamics_of_runs_that_noted_what_the_recipe_asks_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("full", "subnet"):
        _note_every_4(tmp_path / name)
    assert set(of_weights(tmp_path, "evidence.dynamics_steps=4").dynamics()) == {"full", "subnet"}
    assert not caplog.records


def test_dynamics_that_no_recipe_asks_for_are_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _note_every_4(tmp_path / "full")
    assert of_weights(tmp_path).dynamics() == {}
    assert not caplog.records


def test_dynamics_that_were_asked_for_too_late_say_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _note_every_4(tmp_path / "full")
    with caplog.at_level(logging.WARNING):
        found = of_weights(tmp_path, "evidence.dynamics_steps=2").dynamics()
    assert {name: entry.every for name, entry in found.items()} == {"full": 4}
    full, subnet = caplog.messages
    assert "when `full` was trained, its steps were noted every 4" in full
    assert f"Remove `{tmp_path / 'full'}` to train it again" in full
    assert "`--overwrite` keeps it" in full
    assert "when `subnet` was trained, nothing of its steps was noted" in subnet
