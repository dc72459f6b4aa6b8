"""Reading a run's dynamics: what a run wrote comes back, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from subnet_ft.errors import StageError
from subnet_ft.evidence.dynamics import DYNAMICS, FORMAT, Dynamics, read_dynamics

FOUND = Dynamics(
    every=2,
    steps=[2, 4, 5],
    num_parameters=100,
    num_trainable=50,
    never=0.72,
    cancelled=0.08,
    final=0.2,
    density=[0.1, 0.15, 0.2],
    ever=[0.1, 0.2, 0.28],
    recall=[0.4, 0.7, 1.0],
    coverage=[0.8, 0.9, 1.0],
    jaccard=[None, 0.5, 0.7],
    num_updates=[50, 49, None],
    changed_in_step=[0.05, 0.04, None],
    lost_with_masters=[0.9, 0.92, None],
    lost_without_masters=[0.95, 0.96, None],
    missing="",
    seconds=1.5,
    peak_bytes=1000,
    disk_bytes=39,
)


def write(folder: Path, found: dict[str, Any]) -> Path:
    path = folder / DYNAMICS
    path.write_text(json.dumps(found))
    return path


def written(**changes: Any) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(FOUND), **changes}


def test_read_dynamics_reads_a_file_or_the_folder_of_its_run(tmp_path: Path) -> None:
    path = write(tmp_path, written())
    assert read_dynamics(path) == read_dynamics(tmp_path) == FOUND


def test_read_dynamics_of_an_empty_final_mask_has_no_recall(tmp_path: Path) -> None:
    unchanged = replace(
        FOUND, never=1.0, cancelled=0.0, final=0.0, density=[0.0] * 3, recall=[None] * 3, coverage=[None] * 3
    )
    write(tmp_path, {"format": FORMAT, **asdict(unchanged)})
    assert read_dynamics(tmp_path) == unchanged


def test_read_dynamics_says_how_to_get_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"is missing: the run took no snapshots. .*`evidence.dynamics_steps`"):
        read_dynamics(tmp_path)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in written().items() if key != name}


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ([], "not a `dynamics.json` of format 1"),
        (written(format=2), "not a `dynamics.json` of format 1"),
        (without("format"), "not a `dynamics.json` of format 1"),
        (without("recall"), "`recall` is missing"),
        (written(more=1), "has no field `more`"),
        (written(steps=[]), "`steps` must rise"),
        (written(steps=[2, 2, 5]), "`steps` must rise"),
        (written(steps=[0, 2, 5]), "`steps` must rise"),
        (written(recall=[0.4, 1.0]), "`recall` has 2 entries for 3 snapshots"),
        (written(num_updates=[1]), "`num_updates` has 1 entries for 3 snapshots"),
        (written(recall=[0.4, 0.7, 1.1]), r"`recall` must lie in \[0, 1\], got 1.1"),
        (written(never=-0.1), r"`never` must lie in \[0, 1\], got -0.1"),
        (written(never=0.7), "must add up to 1"),
        (written(density=[0.1, 0.15, 0.21]), "the last `density` be `final`"),
        (written(density="many"), "breaks its format"),
        (written(recall=None), "breaks its format"),
    ],
)
def test_read_dynamics_refuses_what_no_run_writes(found: Any, problem: str, tmp_path: Path) -> None:
    write(tmp_path, found)
    with pytest.raises(StageError, match=problem):
        read_dynamics(tmp_path)


@pytest.mark.parametrize("spoil", [lambda text: text[:50], lambda text: ""])
def test_read_dynamics_refuses_half_a_file(spoil: Callable[[str], str], tmp_path: Path) -> None:
    path = write(tmp_path, written())
    path.write_text(spoil(path.read_text()))
    with pytest.raises(StageError, match="cannot be read as JSON"):
        read_dynamics(tmp_path)
