"""The comparison in short: what `compare --json` prints and what a terminal shows."""

from __future__ import annotations

from typing import Any

from subnet_ft.evidence.comparison import tables
from subnet_ft.evidence.comparison.schema import MethodComparison
from subnet_ft.evidence.report.summary import aligned
from subnet_ft.evidence.report.tables import Table

# Columns of the main table that fit a terminal beside each other.
_SHORT = ("method", "accuracy", "minus full", "trainable", "training memory", "time", "beside")


def summary_for_cli(comparison: MethodComparison) -> dict[str, Any]:
    """Return the object of `compare --json`: one entry per method, sizes in bytes, times in seconds.

    Where `differing_conditions` is not empty, times and peaks were measured under different conditions.
    """
    base = comparison.base
    return {
        "version": comparison.version,
        "num_prompts": comparison.num_prompts,
        "confidence": comparison.confidence,
        "base_accuracy": None if base is None else base.accuracy,
        "differing_conditions": comparison.differing_conditions,
        "methods": [
            {
                "method": result.method,
                **_accuracy(result.accuracy),
                "num_trainable": result.num_trainable,
                "num_parameters": result.num_parameters,
                "memory": result.memory,
                "persistent_bytes": result.persistent_bytes,
                "step_seconds": result.step_seconds,
                "train_seconds": result.train_seconds,
                "checkpoint_bytes": result.checkpoint_bytes,
                "patch_bytes": result.patch_bytes,
                "learning_rate": result.training.get("learning_rate"),
            }
            for result in comparison.methods
        ],
        "quantized": [
            {
                "method": copy.method,
                "quantization": copy.quantization,
                **_accuracy(copy.accuracy),
                "checkpoint_bytes": copy.checkpoint_bytes,
            }
            for copy in comparison.quantized
        ],
    }


def lines_for_terminal(comparison: MethodComparison) -> list[str]:
    """Return the tables as lines of text."""
    main = tables.main_table(comparison)
    kept = [index for index, name in enumerate(main.header) if name.startswith(_SHORT)]
    short = Table([main.header[index] for index in kept], [[row[index] for index in kept] for row in main.rows])
    lines = [comparison.title, "", *aligned(short)]
    copies = tables.quantized_table(comparison)
    if copies is not None:
        lines += ["", *aligned(copies)]
    return [*lines, "", *aligned(tables.settings_table(comparison))]


def _accuracy(entry: Any) -> dict[str, float | None]:
    if entry is None:
        return {"accuracy": None, "ci_low": None, "ci_high": None}
    return {"accuracy": entry.accuracy, "ci_low": entry.ci_low, "ci_high": entry.ci_high}
