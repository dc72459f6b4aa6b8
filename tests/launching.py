"""Starting several processes that train together, as users do: with torchrun, on this machine's CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(
    worker: Path, *arguments: object, processes: int, timeout: float = 300, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a script in processes that find each other, each on one thread.

    Args:
        worker: The script; sees the packages and the shared modules of the tests.
        arguments: Of the script.
        processes: How many.
        timeout: Seconds until they count as hanging.
        check: Fail the test where one of them failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    paths = os.pathsep.join(str(ROOT / part) for part in ("tests", "kernels", "."))
    finished = subprocess.run(
        [*command, str(worker), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check:
        assert finished.returncode == 0, finished.stderr[-5000:]
    return finished
