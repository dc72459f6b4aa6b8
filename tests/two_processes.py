"""Runs a worker script in two gloo processes, as `torchrun` does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def results_of(worker: Path, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Return what each process left in `result-RANK.json` of the folder, which is its first argument."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    paths = os.pathsep.join(str(ROOT / part) for part in ("tests", "kernels", "."))
    finished = subprocess.run(
        [*command, str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in (0, 1)]
