"""The drawings of a comparison: accuracy with its interval, and memory by component, one row per method."""

from __future__ import annotations

from subnet_ft.evidence.comparison.schema import MethodComparison
from subnet_ft.evidence.comparison.tables import label
from subnet_ft.evidence.report.axes import (
    NARROW,
    TOP,
    bottom_of_rows,
    percent_tick,
    row_centre,
    row_label,
    rows_over_axis,
)
from subnet_ft.evidence.report.plots import interval, stacked
from subnet_ft.evidence.report.svg import nice_ticks
from subnet_ft.evidence.report.tables import is_peak
from subnet_ft.evidence.report.wording import percent, size


def accuracy_plot(comparison: MethodComparison, width: float) -> str | None:
    """Accuracy of the base and of every method with its own interval; a line at the full run."""
    entries = [("base", comparison.base), *((result.method, result.accuracy) for result in comparison.methods)]
    found = [(name, entry) for name, entry in entries if entry is not None]
    if not found:
        return None
    low, high = min(entry.ci_low for _, entry in found), max(entry.ci_high for _, entry in found)
    ticks = [tick for tick in nice_ticks(low, high, 4 if width < NARROW else 7) if -1e-9 <= tick <= 1 + 1e-9]
    title = "Accuracy of every method with its interval"
    svg, x = rows_over_axis(width, len(found), ticks, percent_tick, title, right=58)
    full = dict(found).get("full")
    if full is not None:
        svg.line(x(full.accuracy), TOP, x(full.accuracy), bottom_of_rows(width, len(found)), "reference")
    for row, (name, entry) in enumerate(found):
        y = row_centre(width, row)
        shown = "base model" if name == "base" else label(name)
        tip = f"{shown}: {percent(entry.accuracy)}, {entry.ci_low * 100:.1f} to {entry.ci_high * 100:.1f} %"
        row_label(svg, shown, y)
        interval(svg, x, y, entry.ci_low, entry.accuracy, entry.ci_high, css_class(comparison, name), tip)
        svg.text(width - 2, y + 4, percent(entry.accuracy), "value", anchor="end")
    return svg.render()


def memory_plot(comparison: MethodComparison, width: float) -> str | None:
    """Bytes that live from step to step, stacked by component."""
    stacks = {
        label(result.method): {key: float(value) for key, value in result.memory.items() if not is_peak(key)}
        for result in comparison.methods
    }
    if not any(stacks.values()):
        return None
    return stacked(stacks, memory_parts(comparison), width, size, "Training memory by component")


def memory_parts(comparison: MethodComparison) -> list[str]:
    """Return the components in the order in which they are coloured."""
    return list(dict.fromkeys(key for result in comparison.methods for key in result.memory if not is_peak(key)))


def css_class(comparison: MethodComparison, name: str) -> str:
    """Return the class that colours a model."""
    if name in ("base", "full", "subnet"):
        return f"m-{name}"
    others = [result.method for result in comparison.methods if result.method not in ("full", "subnet")]
    return f"m-control-{others.index(name) % 3 + 1}"
