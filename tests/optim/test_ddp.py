"""MaskedAdamW under DDP with two gloo processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_masked_adamw_under_ddp_equals_one_process_on_all_data() -> None:
    worker = Path(__file__).with_name("ddp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert len(results) == 2
    assert results[0]["digest"] == results[1]["digest"]
    for result in results:
        assert "2 processes train together" in result["refusal"]
        assert "`compact_grads=False`" in result["refusal"]
        assert result["off_mask"] == 0
        assert result["moved"] > 0.5 * result["trainable"]
        # Averaging two gradients rounds otherwise than one gradient of both batches; a process that trained on its own
        # data only ends far away.
        assert result["to_all_data"] < 1e-5
        assert result["to_own_data"] > 1e-3
