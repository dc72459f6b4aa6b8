"""Drawings with one row per model: accuracy, differences, identity, memory and time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from subnet_ft.evidence.report.axes import (
    NARROW,
    TOP,
    Scale,
    bottom_of_rows,
    css_class,
    left_edge,
    percent_tick,
    points_tick,
    row_centre,
    row_label,
    rows_over_axis,
)
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.svg import Svg, nice_ticks
from subnet_ft.evidence.report.tables import is_peak, words
from subnet_ft.evidence.report.wording import duration, label, percent, points, size, typographic, whole_cost


def accuracy_plot(report: Report, width: float) -> str | None:
    """Accuracy of every model with its own interval; a band of one margin lies around the full run."""
    names = [name for name in report.models if name in report.accuracy]
    if not names:
        return None
    entries = [report.accuracy[name] for name in names]
    full = report.accuracy.get(report.full)
    low, high = min(entry.ci_low for entry in entries), max(entry.ci_high for entry in entries)
    if full is not None:
        low, high = min(low, full.accuracy - report.margin), max(high, full.accuracy + report.margin)
    ticks = [tick for tick in nice_ticks(low, high, 4 if width < NARROW else 7) if -1e-9 <= tick <= 1 + 1e-9]
    svg, x = rows_over_axis(
        width, len(names), ticks, percent_tick, "Accuracy of every model with its interval", right=58
    )
    if full is not None:
        _band(svg, x, full.accuracy - report.margin, full.accuracy + report.margin, len(names))
        svg.line(x(full.accuracy), TOP, x(full.accuracy), bottom_of_rows(width, len(names)), "reference")
    for row, (name, entry) in enumerate(zip(names, entries, strict=True)):
        y = row_centre(width, row)
        tip = (
            f"{label(report, name)}: {percent(entry.accuracy)}, {entry.ci_low * 100:.1f} to {entry.ci_high * 100:.1f} %"
        )
        row_label(svg, label(report, name), y)
        interval(svg, x, y, entry.ci_low, entry.accuracy, entry.ci_high, css_class(report, name), tip)
        svg.text(width - 2, y + 4, percent(entry.accuracy), "value", anchor="end")
    return svg.render()


def difference_plot(report: Report, width: float) -> str | None:
    """Paired difference of every run to the full run: the interval and the band that the verdict looks at."""
    level = round(2 * report.confidence - 1, 12)
    found = [(name, report.difference(name, report.full, confidence=level)) for name in report.runs]
    gaps = [(name, gap) for name, gap in found if gap is not None]
    if not gaps:
        return None
    margin = report.margin
    low = min([-margin, *(gap.low for _, gap in gaps)]) * 1.05
    high = max([margin, *(gap.high for _, gap in gaps)]) * 1.05
    ticks = nice_ticks(low, high, 4 if width < NARROW else 7)
    title = "Paired difference of every run to the full run, in points"
    svg, x = rows_over_axis(width, len(gaps), ticks, points_tick, title, right=58)
    _band(svg, x, -margin, margin, len(gaps))
    svg.line(x(0), TOP, x(0), bottom_of_rows(width, len(gaps)), "reference")
    for row, (name, gap) in enumerate(gaps):
        y = row_centre(width, row)
        tip = typographic(
            f"{label(report, name)}: {points(gap.difference)} points, {points(gap.low)} to {points(gap.high)}"
        )
        row_label(svg, label(report, name), y)
        interval(svg, x, y, gap.low, gap.difference, gap.high, css_class(report, name), tip)
        svg.text(width - 2, y + 4, typographic(points(gap.difference)), "value", anchor="end")
    return svg.render()


def identity_plot(report: Report, width: float) -> str | None:
    """Share of weights equal to the full run's: a bar over those whose bits it changed, a ring over all weights."""
    entry = next((report.weights[name] for name in report.runs if name in report.weights), None)
    if entry is None or entry.base_in_mask_identical is None:
        return None
    rows = [(report.base, entry.base_in_mask_identical["0"], entry.base_identical["0"])]
    for name in report.runs:
        weights = report.weights.get(name)
        if weights is not None and weights.in_mask_identical is not None and name != report.full:
            rows.append((name, weights.in_mask_identical["0"], weights.identical["0"]))
    ticks = [0, 0.25, 0.5, 0.75, 1]
    svg, x = rows_over_axis(width, len(rows), ticks, percent_tick, "Share of weights equal to the full run's", right=58)
    for row, (name, inside, overall) in enumerate(rows):
        y = row_centre(width, row)
        style = css_class(report, name)
        row_label(svg, label(report, name), y)
        svg.line(x(0), y, x(1), y, "grid")
        svg.rect(
            x(0),
            y - 8,
            x(inside) - x(0),
            16,
            f"bar {style}",
            tip=f"where the full run changed the bits: {percent(inside)}",
        )
        svg.circle(x(overall), y, 5.5, f"ring {style}", tip=f"over all weights: {percent(overall, 2)}")
        svg.text(width - 2, y + 4, percent(inside), "value", anchor="end")
    return svg.render()


def memory_plot(report: Report, width: float) -> str | None:
    """Bytes that live from step to step, stacked by component."""
    runs = [name for name in report.runs if any(not is_peak(key) for key in report.memory.get(name, {}))]
    if not runs:
        return None
    stacks = {
        label(report, name): {key: float(value) for key, value in report.memory[name].items() if not is_peak(key)}
        for name in runs
    }
    return stacked(stacks, stack_parts(report.memory, report), width, size, "Memory by component")


def time_plot(report: Report, width: float) -> str | None:
    """Time of every run, stacked by stage; under the subnetwork, what it took with the run that made its mask."""
    stacks: dict[str, dict[str, float]] = {}
    for name in report.models:
        if name in report.seconds:
            stacks[label(report, name)] = dict(report.seconds[name])
        if name == report.subnet and (whole := whole_cost(report)) is not None:
            stacks["with the full run"] = whole
    if not stacks:
        return None
    return stacked(stacks, time_parts(report), width, duration, "Time by stage")


def time_parts(report: Report) -> list[str]:
    """Return the stages in the order in which they are coloured, the mask's own last."""
    return list(dict.fromkeys([*stack_parts(report.seconds, report), *(whole_cost(report) or {})]))


def stack_parts(source: Mapping[str, Mapping[str, float]], report: Report) -> list[str]:
    """Return the stages or components in the order in which they are coloured: those of trained runs first."""
    keys = [key for name in (*report.runs, report.base) for key in source.get(name, {}) if not is_peak(key)]
    return list(dict.fromkeys(keys))


def stacked(
    stacks: dict[str, dict[str, float]], parts: list[str], width: float, write: Callable[[float], str], title: str
) -> str:
    """Draw one bar per row, stacked by part; `parts` gives the order of the colours."""
    most = max(sum(stack.values()) for stack in stacks.values()) or 1.0
    svg = Svg(width, bottom_of_rows(width, len(stacks)) + 4, title)
    x = Scale(0, most, left_edge(width), width - 92)
    for row, (name, stack) in enumerate(stacks.items()):
        y = row_centre(width, row)
        row_label(svg, name, y)
        start = 0.0
        for part, value in stack.items():
            style = f"part part-{parts.index(part) % 6 + 1}"
            length = x(start + value) - x(start)
            svg.rect(x(start), y - 9, max(length - 1, 0.5), 18, style, tip=f"{name}, {words(part)}: {write(value)}")
            start += value
        svg.text(x(start) + 7, y + 4, write(start), "value")
    return svg.render()


def _band(svg: Svg, x: Scale, low: float, high: float, rows: int) -> None:
    start, end = x(max(low, x.low)), x(min(high, x.high))
    svg.rect(start, TOP, end - start, bottom_of_rows(svg.width, rows) - TOP, "band")


def interval(svg: Svg, x: Scale, y: float, low: float, value: float, high: float, style: str, tip: str) -> None:
    """Draw a value with its interval; the tip shows under the pointer."""
    svg.line(x(low), y, x(high), y, f"whisker {style}")
    svg.circle(x(value), y, 5, f"dot {style}", tip=tip)
