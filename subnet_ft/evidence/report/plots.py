"""Drawings with one row per model: accuracy, differences, identity, memory and time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from subnet_ft.evidence.report.axes import (
    Scale,
    bottom_of_rows,
    css_class,
    left_edge,
    percent_tick,
    points_tick,
    row_centre,
    row_label,
)
from subnet_ft.evidence.report.row_plots import Mark, Row, rows_plot
from subnet_ft.evidence.report.schema import Difference, Report
from subnet_ft.evidence.report.svg import Svg
from subnet_ft.evidence.report.tables import is_peak, words
from subnet_ft.evidence.report.wording import (
    SECOND_FULL,
    duration,
    label,
    percent,
    points,
    size,
    typographic,
    whole_time,
)


def accuracy_plot(report: Report, width: float) -> str | None:
    """Accuracy of every model with its own interval; a band of one margin lies around the full run."""
    rows = []
    for name in report.models:
        if (entry := report.accuracy.get(name)) is not None:
            low, high = entry.ci_low, entry.ci_high
            tip = f"{label(report, name)}: {percent(entry.accuracy)}, {low * 100:.1f} to {high * 100:.1f} %"
            text = percent(entry.accuracy)
            rows.append(Row(label(report, name), css_class(report, name), entry.accuracy, text, low, high, tip=tip))
    full = report.accuracy.get(report.full)
    return rows_plot(
        rows,
        width,
        title="Accuracy of every model with its interval",
        write=percent_tick,
        limits=(0, 1),
        band=None if full is None else (full.accuracy - report.margin, full.accuracy + report.margin),
        reference=None if full is None else full.accuracy,
    )


def difference_plot(report: Report, width: float) -> str | None:
    """Paired difference of every run to the full run: the interval and the band that the verdict looks at."""
    level = round(2 * report.confidence - 1, 12)
    gaps = {name: report.difference(name, report.full, confidence=level) for name in report.runs}
    return _differences(report, gaps, width, "Paired difference of every run to the full run, in points")


def lead_plot(report: Report, width: float) -> str | None:
    """Paired difference of the subnetwork to every control and baseline."""
    gaps = {name: report.difference(report.subnet, name) for name in (*report.controls, *report.baselines)}
    return _differences(report, gaps, width, "Subnetwork minus every other run, in points")


def _differences(report: Report, gaps: Mapping[str, Difference | None], width: float, title: str) -> str | None:
    rows = []
    for name, gap in gaps.items():
        if gap is not None:
            text = typographic(points(gap.difference))
            tip = typographic(f"{label(report, name)}: {text} points, {points(gap.low)} to {points(gap.high)}")
            style = css_class(report, name)
            rows.append(Row(label(report, name), style, gap.difference, text, gap.low, gap.high, tip=tip))
    band = (-report.margin, report.margin)
    return rows_plot(rows, width, title=title, write=points_tick, band=band, reference=0.0)


def identity_plot(report: Report, width: float) -> str | None:
    """Share of weights equal to the full run's: a bar over those whose bits it changed, a ring over all weights."""
    entry = next((report.weights[name] for name in report.runs if name in report.weights), None)
    if entry is None or entry.base_in_mask_identical is None:
        return None
    found = [(label(report, report.base), "m-base", entry.base_in_mask_identical["0"], entry.base_identical["0"])]
    for name in report.runs:
        weights = report.weights.get(name)
        if weights is not None and weights.in_mask_identical is not None and name != report.full:
            style = css_class(report, name)
            found.append((label(report, name), style, weights.in_mask_identical["0"], weights.identical["0"]))
    if report.floor is not None and report.floor.weights.in_mask_identical is not None:
        second = report.floor.weights
        assert second.in_mask_identical is not None
        found.append((SECOND_FULL, "m-full", second.in_mask_identical["0"], second.identical["0"]))
    rows = [
        Row(
            name,
            style,
            inside,
            percent(inside),
            is_bar=True,
            marks=(Mark(overall, style, tip=f"{name}, over all weights: {percent(overall, 2)}"),),
            tip=f"{name}, where the full run changed the bits: {percent(inside)}",
        )
        for name, style, inside, overall in found
    ]
    title = "Share of weights equal to the full run's"
    return rows_plot(rows, width, title=title, write=percent_tick, within=(0, 1), limits=(0, 1))


def distance_plot(report: Report, width: float) -> str | None:
    """Distance of every run's weights to the full run's, as a part of the base model's."""
    distances = {name: report.weights[name].relative_distance for name in report.runs if name in report.weights}
    rows = [
        Row(
            label(report, name),
            css_class(report, name),
            distance,
            f"{distance:.2f}",
            is_bar=True,
            tip=f"{distance:.3f}",
        )
        for name, distance in distances.items()
        if distance is not None and name != report.full
    ]
    second = None if report.floor is None else report.floor.weights.relative_distance
    if second is not None:
        rows.append(Row(SECOND_FULL, "m-full", second, f"{second:.2f}", is_bar=True, tip=f"{second:.3f}"))
    title = "Distance of every run to the full run"
    return rows_plot(rows, width, title=title, write="{:g}".format, within=(0, 1), reference=1.0)


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
        if name == report.subnet and (whole := whole_time(report)) is not None:
            stacks["the first time, in all"] = whole
    if not stacks:
        return None
    return stacked(stacks, time_parts(report), width, duration, "Time by stage")


def time_parts(report: Report) -> list[str]:
    """Return the stages in the order in which they are coloured, the mask's own last."""
    return list(dict.fromkeys([*stack_parts(report.seconds, report), *(whole_time(report) or {})]))


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
    longest = max(len(write(sum(stack.values()))) for stack in stacks.values())
    x = Scale(0, most, left_edge(width), width - 16 - 7.6 * longest)
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


def interval(svg: Svg, x: Scale, y: float, low: float, value: float, high: float, style: str, tip: str) -> None:
    """Draw a value with its interval; the tip shows under the pointer."""
    svg.line(x(low), y, x(high), y, f"whisker {style}")
    svg.circle(x(value), y, 5, f"dot {style}", tip=tip)
