"""What Triton would start on a GPU, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_ops_launch_as_on_a_gpu_and_compile_each_kernel_once(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton, which exists for Linux only")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT / "kernels"), str(ROOT), str(ROOT / "tests")]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    worker = Path(__file__).with_name("gpu_launch_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["compiled"]["compact_slots"] == 1  # whatever the scale and the alignment
    assert report["launched"]["compact_slots"] == 4
    assert report["compiled"]["compare_tile"] == 4  # two criteria, whole and partial tiles
    assert report["compiled"]["fingerprint_tile"] == 4  # with and without a mask, whole and partial tiles
    assert set(report["launched"]) == {
        "step_slots", "step_full", "gather_slots", "scatter_slots", "swap_slots", "compact_slots", "compare_tile",
        "fingerprint_tile",
    }  # fmt: skip
