"""The tables of a comparison, as text cells: Markdown, HTML and the terminal only lay them out."""

from __future__ import annotations

from subnet_ft.evidence.comparison.schema import MethodComparison, MethodResult
from subnet_ft.evidence.report.tables import Table, accuracy_cell, difference_cell, is_peak, words
from subnet_ft.evidence.report.wording import duration, percent, size

_NONE = "\u2013"


def main_table(comparison: MethodComparison) -> Table:
    """What every method reached and what it took; no times where the runs had other conditions."""
    has_full = any(result.method == "full" for result in comparison.methods)
    level = f"{comparison.confidence * 100:g} %"
    header = [
        "method",
        f"accuracy [{level}]",
        "minus base, points",
        *(["minus full run, points"] if has_full else []),
        "trainable weights",
        "share",
        "training memory",
        "bytes per weight",
        "time per step",
        "checkpoint",
        "beside the base",
    ]
    rows = [["base model", accuracy_cell(comparison.base), *[_NONE] * (len(header) - 2)]]
    # Bytes per weight of the base, so that the figures of a frozen model with added weights compare.
    num_base = min((result.num_parameters for result in comparison.methods if result.trains == "mask"), default=None)
    for result in comparison.methods:
        against = ["base", *(["full"] if has_full else [])]
        weights = num_base or result.num_parameters
        rows.append(
            [
                label(result.method),
                accuracy_cell(result.accuracy),
                *(difference_cell(comparison.difference(result.method, other)) for other in against),
                f"{result.num_trainable:,}",
                percent(result.num_trainable / result.num_parameters, 2),
                size(result.persistent_bytes),
                f"{result.persistent_bytes / weights:.2f}",
                _NONE if comparison.differing_conditions else duration(result.step_seconds),
                size(result.checkpoint_bytes),
                _NONE if result.patch_bytes is None else size(result.patch_bytes),
            ]
        )
    return Table(header, rows)


def memory_table(comparison: MethodComparison) -> Table:
    """Bytes by component and method; no peaks where the runs had other conditions."""
    stacks = [result.memory for result in comparison.methods]
    components = list(dict.fromkeys(key for stack in stacks for key in stack if not is_peak(key)))
    peaks = list(dict.fromkeys(key for stack in stacks for key in stack if is_peak(key)))
    rows = [
        [
            label(result.method),
            *(_size(result, key) for key in components),
            size(result.persistent_bytes),
            *(_NONE if comparison.differing_conditions else _size(result, key) for key in peaks),
        ]
        for result in comparison.methods
    ]
    return Table(["method", *map(words, components), "together", *map(words, peaks)], rows)


def quantized_table(comparison: MethodComparison) -> Table | None:
    """Quantized copies of the results."""
    if not comparison.quantized:
        return None
    level = f"{comparison.confidence * 100:g} %"
    rows = [
        [
            f"{label(copy.method)}, {copy.quantization}",
            accuracy_cell(copy.accuracy),
            difference_cell(copy.difference),
            size(copy.checkpoint_bytes),
        ]
        for copy in comparison.quantized
    ]
    return Table(["copy", f"accuracy [{level}]", "minus the result itself, points", "size"], rows)


def settings_table(comparison: MethodComparison) -> Table:
    """What every method ran with."""
    rows = []
    for result in comparison.methods:
        rate = result.training.get("learning_rate")
        others = {key: value for key, value in result.training.items() if key != "learning_rate"}
        entries = [f"{key}: {value}" for key, value in {**others, **result.config}.items()]
        rows.append([label(result.method), _NONE if rate is None else f"{rate:g}", ", ".join(entries) or _NONE])
    return Table(["method", "learning rate", "other settings of its own"], rows)


def label(method: str) -> str:
    """Return what a reader calls a method."""
    return {"full": "full run", "subnet": "subnetwork"}.get(method, method.replace("_", " "))


def _size(result: MethodResult, key: str) -> str:
    return size(result.memory[key]) if key in result.memory else _NONE
