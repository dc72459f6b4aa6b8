"""A restricted trainer under DDP, two gloo processes: one checkpoint for both, completions of each, the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="transformers before 5.18 cannot resume several processes on the CPU: it loads to `cpu:0`, unknown to torch",
)
def test_restrict_resumes_to_the_same_bits_under_ddp(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("two_processes_worker.py")
    paths = os.pathsep.join(str(ROOT / part) for part in ("tests/training", "tests", "kernels", "."))
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(worker),
            str(tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0]["completions"] != results[1]["completions"], "each process samples its own completions"
    for result in results:
        assert result["steps"] == 3
        assert not result["compact"]
        assert result["differs"] == []
        assert result["off_mask"] == []
        assert result["moved"] > 0.5 * result["trainable"]
        assert {"subnet_rollouts_0.pt", "subnet_rollouts_1.pt", "rng_state_0.pth", "rng_state_1.pth"} <= {
            *result["files"]
        }
