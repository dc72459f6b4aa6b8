"""Kill -9 at random moments: every resumed run ends with the bits of one that nobody killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def killed_runs(name: str, folder: Path, *, kills: int, seed: int, only_delta: bool = False) -> dict[str, Any]:
    """Run the harness in a process of its own, whose children may be killed, and return what it counted."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("tests/training", "tests", "kernels", "."))
    command = [sys.executable, str(Path(__file__).with_name("kill_harness.py")), name, str(folder)]
    done = subprocess.run(
        [*command, "--kills", str(kills), "--seed", str(seed), *(["--only-delta"] if only_delta else [])],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counted: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return counted


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_a_killed_run_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    counted = killed_runs(name, tmp_path / "runs", kills=5, seed=3)
    assert sum(counted["kills"].values()) == 5
    assert counted["resumed_from"], "no run was resumed"
    assert counted["differences"] == []


def test_a_killed_run_whose_checkpoints_hold_deltas_ends_with_the_bits_of_one_with_dense_ones(tmp_path: Path) -> None:
    counted = killed_runs("DPO", tmp_path / "runs", kills=5, seed=3, only_delta=True)
    assert sum(counted["kills"].values()) == 5
    assert counted["resumed_from"], "no run was resumed"
    assert counted["differences"] == []


@pytest.mark.slow
@pytest.mark.parametrize("only_delta", [False, True])
@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_a_run_killed_at_thirty_moments_resumes_to_the_same_bits(name: str, only_delta: bool, tmp_path: Path) -> None:
    counted = killed_runs(name, tmp_path / "runs", kills=30, seed=0, only_delta=only_delta)
    print(f"\n{name}, only_delta={only_delta}: {json.dumps(counted)}")
    assert min(counted["kills"]["stepping"], counted["kills"]["saving"]) >= 5
    assert counted["unfinished_checkpoints_found"] >= 5, "no kill fell into the writing of a checkpoint"
    assert len(counted["resumed_from"]) >= 4, "the run was resumed at few steps only"
    assert counted["differences"] == []
