"""MaskedAdamW under DDP with two gloo processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_masked_adamw_under_ddp_keeps_off_mask_bits_and_equal_replicas() -> None:
    worker = Path(__file__).with_name("ddp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, second = (json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{"))
    assert first == second
    assert first["off_mask"] == 0
    assert first["moved"] > 0.5 * first["trainable"]
