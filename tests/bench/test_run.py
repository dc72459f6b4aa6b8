"""What the table counts, and what its lines say."""

from __future__ import annotations

import pytest

from subnet_ft.bench.run import _counted, lines_for_terminal
from subnet_kernels.traffic import step_traffic

CONDITIONS = {
    "processor": "a CPU", "threads": 1, "packages": {"torch": "2", "numba": "0"}, "shapes": "one", "masks": "random",
    "learning_rate": 1e-5, "repeats": 1, "copy_bandwidth": 1e10,
}  # fmt: skip


def test_counted_bytes_leave_out_the_fetch_of_lines_written_in_part() -> None:
    # Nearly every line of 32 bfloat16 holds a changed one: 2 bytes per weight are written, and 2 fetched before.
    found = _counted(0.5, compaction=True, changed_share=1.0)
    assert step_traffic(0.5, compaction=True, changed=1.0) - found == pytest.approx(2.0, abs=1e-6)
    # Whole tensors are written whole: dense gradient, moments, masters, weights.
    assert _counted(1.0, compaction=False, changed_share=0.3) == 28.0


def test_lines_for_terminal_say_what_is_counted_and_refused() -> None:
    row = {"op": "extract", "method": "ours", "density": 0.17, "median_ms": None, "refused": "it found less"}
    memory = {
        "op": "dpo_step", "method": "ours", "density": 0.2, "median_ms": None, "bytes_per_parameter": 5.33,
        "peak_bytes_per_parameter": 6.7, "first_step_peak_bytes_per_parameter": 6.6,
    }  # fmt: skip
    lines = lines_for_terminal({"conditions": CONDITIONS, "rows": [row, memory], "refused": {"compact": "it is wrong"}})
    assert "10.0 GB/s; neither it nor our share of it counts lines that are fetched only to be overwritten" in lines[1]
    assert lines[-2:] == ["No speed is shown: it is wrong.", "No speed is shown: it found less."]
    assert "peak 6.70 bytes/weight, in the first step 6.60" in "\n".join(lines)
