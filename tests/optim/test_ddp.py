"""MaskedAdamW under DDP with two gloo processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WAYS = (
    "as it comes",
    "a tensor leaves and comes back",
    "masked norm",
    "full norm",
    "full norm, a frozen tensor",
    "micro-batches",
    "NaN in one process",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What either process wrote."""
    folder = tmp_path_factory.mktemp("ddp")
    worker = Path(__file__).with_name("ddp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    paths = os.pathsep.join(str(ROOT / part) for part in ("kernels", "."))
    finished = subprocess.run(
        [*command, str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in (0, 1)]


def test_masked_adamw_under_ddp_refuses_compact_gradients(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "2 processes train together" in rank["refusal"]
        assert "`compact_grads=False`" in rank["refusal"]


@pytest.mark.parametrize("way", WAYS)
def test_both_processes_have_the_same_bits_after_every_step(ranks: list[dict[str, Any]], way: str) -> None:
    digests, other = (rank["ways"][way]["digests"] for rank in ranks)
    assert digests == other
    assert len(digests) == 5
    assert len(set(digests)) == (4 if way == "NaN in one process" else 5)
    for rank in ranks:
        assert rank["ways"][way]["off_mask"] == 0
        assert rank["ways"][way]["moved"] > 0.5 * rank["ways"][way]["trainable"]


@pytest.mark.parametrize("way", [way for way in WAYS if way != "NaN in one process"])
def test_masked_adamw_under_ddp_equals_one_process_on_all_data(ranks: list[dict[str, Any]], way: str) -> None:
    for rank in ranks:
        # Averaging two gradients rounds otherwise than one gradient of both batches; a process that trained on its own
        # data only ends far away.
        assert rank["ways"][way]["to_all_data"] < 1e-5
        assert rank["ways"][way]["to_own_data"] > 1e-3


def test_the_full_norm_clips_more_than_the_masked_one(ranks: list[dict[str, Any]]) -> None:
    """Or the test of the full norm would show nothing."""
    for rank in ranks:
        assert rank["ways"]["full norm"]["digests"][0] != rank["ways"]["masked norm"]["digests"][0]


def test_a_tensor_that_leaves_under_ddp_stands_still_until_it_comes_back(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        first, second, third, fourth, fifth = rank["ways"]["a tensor leaves and comes back"]["digests_of_one"]
        assert first == second == third
        assert len({third, fourth, fifth}) == 3


def test_nan_in_one_process_leaves_the_step_out_in_both(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["ways"]["NaN in one process"]
        assert found["skipped"] == 1
        assert found["digests"][2] == found["digests"][1]
        assert found["digests"][:2] == rank["ways"]["as it comes"]["digests"][:2]
        assert found["digests"][3:] != rank["ways"]["as it comes"]["digests"][3:]
