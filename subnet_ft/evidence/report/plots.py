"""The drawings of a report. Each is drawn for one width, so that text keeps its size on a phone.

Colours come from CSS classes: `m-base`, `m-full`, `m-subnet`, `m-control-1`, ... set `--c`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.svg import Svg, nice_ticks
from subnet_ft.evidence.report.tables import is_peak, short_kind, words
from subnet_ft.evidence.report.wording import duration, label, percent, points, size, tolerance_text, typographic

_ROW = 34.0
_TOP = 8.0
_AXIS = 26.0
_NARROW = 480.0


@dataclass(frozen=True)
class Scale:
    """A linear map from values to positions."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return self.start + share * (self.end - self.start)


def css_class(report: Report, name: str) -> str:
    """Return the class that colours a model."""
    roles = {report.base: "m-base", report.full: "m-full", report.subnet: "m-subnet"}
    if name in roles:
        return roles[name]
    # By name, so that a control keeps its colour whichever speaks most against the subnetwork.
    return f"m-control-{sorted(report.controls).index(name) % 3 + 1}"


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
    ticks = [tick for tick in nice_ticks(low, high, 4 if width < _NARROW else 7) if -1e-9 <= tick <= 1 + 1e-9]
    svg, x = _rows(width, len(names), ticks, percent_tick, "Accuracy of every model with its interval", right=58)
    if full is not None:
        _band(svg, x, full.accuracy - report.margin, full.accuracy + report.margin, len(names))
        svg.line(x(full.accuracy), _TOP, x(full.accuracy), _TOP + _ROW * len(names), "reference")
    for row, (name, entry) in enumerate(zip(names, entries, strict=True)):
        y = _TOP + _ROW * (row + 0.5)
        tip = f"{label(report, name)}: {percent(entry.accuracy)}, {entry.ci_low * 100:.1f} to {entry.ci_high * 100:.1f} %"
        _row_label(svg, report, name, y)
        _interval(svg, x, y, entry.ci_low, entry.accuracy, entry.ci_high, css_class(report, name), tip)
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
    ticks = nice_ticks(low, high, 4 if width < _NARROW else 7)
    title = "Paired difference of every run to the full run, in points"
    svg, x = _rows(width, len(gaps), ticks, points_tick, title, right=58)
    _band(svg, x, -margin, margin, len(gaps))
    svg.line(x(0), _TOP, x(0), _TOP + _ROW * len(gaps), "reference")
    for row, (name, gap) in enumerate(gaps):
        y = _TOP + _ROW * (row + 0.5)
        tip = typographic(
            f"{label(report, name)}: {points(gap.difference)} points, {points(gap.low)} to {points(gap.high)}"
        )
        _row_label(svg, report, name, y)
        _interval(svg, x, y, gap.low, gap.difference, gap.high, css_class(report, name), tip)
        svg.text(width - 2, y + 4, typographic(points(gap.difference)), "value", anchor="end")
    return svg.render()


def identity_plot(report: Report, width: float) -> str | None:
    """Share of weights equal to the full run's: a bar inside its mask, a ring over all weights."""
    entry = next((report.weights[name] for name in report.runs if name in report.weights), None)
    if entry is None or entry.base_in_mask_identical is None:
        return None
    rows = [(report.base, entry.base_in_mask_identical["0"], entry.base_identical["0"])]
    for name in report.runs:
        weights = report.weights.get(name)
        if weights is not None and weights.in_mask_identical is not None and name != report.full:
            rows.append((name, weights.in_mask_identical["0"], weights.identical["0"]))
    ticks = [0, 0.25, 0.5, 0.75, 1]
    svg, x = _rows(width, len(rows), ticks, percent_tick, "Share of weights equal to the full run's", right=58)
    for row, (name, inside, overall) in enumerate(rows):
        y = _TOP + _ROW * (row + 0.5)
        style = css_class(report, name)
        _row_label(svg, report, name, y)
        svg.line(x(0), y, x(1), y, "grid")
        svg.rect(x(0), y - 8, x(inside) - x(0), 16, f"bar {style}", tip=f"inside the mask: {percent(inside)}")
        svg.circle(x(overall), y, 5.5, f"ring {style}", tip=f"over all weights: {percent(overall, 2)}")
        svg.text(width - 2, y + 4, percent(inside), "value", anchor="end")
    return svg.render()


def density_plot(report: Report, width: float) -> str | None:
    """Density of every matrix, layers across and kinds down; what lies outside the layers has its own rows."""
    density = report.density
    if density is None:
        return None
    layers = [layer for layer in density.by_layer if layer != "other"]
    grid = density.by_layer_and_kind
    kinds = list(dict.fromkeys(kind for layer in layers for kind in grid.get(layer, {})))
    outside = grid.get("other", {})
    left, right, gap = _left(width), 4.0, 1.0
    cell = 18.0
    top = 4.0
    below = top + cell * len(kinds) + (18 if layers else 0)
    height = below + (8 + cell * len(outside) if outside else 0) + 34
    svg = Svg(width, height, "Density of the mask by layer and matrix kind")
    highest = max((share for row in grid.values() for share in row.values()), default=0.0) or 1.0
    step = (width - left - right) / max(len(layers), 1)
    for row, kind in enumerate(kinds):
        y = top + cell * row
        svg.text(left - 8, y + 12.5, short_kind(kind), "tick", anchor="end")
        for column, layer in enumerate(layers):
            share = grid[layer].get(kind)
            if share is not None:
                tip = f"layer {layer}, {kind}: {percent(share)}"
                svg.rect(left + step * column, y, step - gap, cell - gap, "cell-back")
                svg.rect(left + step * column, y, step - gap, cell - gap, "cell", tip=tip, opacity=share / highest)
    every = max(1, round(len(layers) / (6 if width < _NARROW else 12)))
    for column, layer in enumerate(layers):
        if column % every == 0:
            svg.text(left + step * (column + 0.5), below - 5, layer, "tick", anchor="middle")
    y = below + 8
    for kind, share in outside.items():
        svg.text(left - 8, y + 12.5, short_kind(kind), "tick", anchor="end")
        length = (width - left - right - 56) * share / highest
        svg.rect(left, y + 3, max(length, 1.0), cell - 7, "cell", tip=f"{kind}: {percent(share)}")
        svg.text(left + max(length, 1.0) + 8, y + 12.5, percent(share), "tick")
        y += cell
    y += 8
    svg.text(left - 8, y + 10, "density", "tick", anchor="end")
    span = min(150.0, (width - left - right) * 0.5)
    for number in range(8):
        svg.rect(left + span * number / 8, y, span / 8 - gap, 12, "cell-back")
        svg.rect(left + span * number / 8, y, span / 8 - gap, 12, "cell", opacity=number / 7)
    svg.text(left + span + 8, y + 10, f"0 to {percent(highest)}", "tick")
    return svg.render()


def tolerance_plot(report: Report, width: float) -> str | None:
    """Density that the full run's mask has at other tolerances."""
    density = report.density
    if density is None or len(density.by_tolerance) < 2:
        return None
    entries = sorted(density.by_tolerance.items(), key=lambda entry: float(entry[0]))
    ticks = nice_ticks(0, max(share for _, share in entries), 4)
    svg, y = _upright(width, 190, ticks, percent_tick, "Density by tolerance")
    x = Scale(-0.5, len(entries) - 0.5, 48, width - 8)
    svg.path([(x(index), y(share)) for index, (_, share) in enumerate(entries)], "curve m-subnet")
    for index, (tolerance, share) in enumerate(entries):
        svg.circle(x(index), y(share), 3.5, "dot m-subnet", tip=f"tolerance {tolerance}: {percent(share)}")
        svg.text(x(index), y(share) - 9, f"{share * 100:.1f}", "tick", anchor="middle")
        svg.text(x(index), 182, typographic(tolerance_text(tolerance, "exact")), "tick", anchor="middle")
    return svg.render()


def curves_plot(report: Report, metric: str, width: float) -> str | None:
    """One logged quantity of every run over the steps: thin as logged, bold as a centred mean."""
    series = {}
    for name in report.runs:
        values = [(entry["step"], entry[metric]) for entry in report.curves.get(name, []) if metric in entry]
        if len(values) >= 2:
            series[name] = values
    if not series:
        return None
    window = smoothing(report, metric)
    smooth = {name: _centred_mean(values, window) for name, values in series.items()}
    every = [value for values in series.values() for _, value in values]
    steps = [step for values in series.values() for step, _ in values]
    ticks = nice_ticks(min(every), max(every), 4)
    svg, y = _upright(width, 240, ticks, _tick, f"{metric} of every run by step")
    x = Scale(min(steps), max(steps), 48, width - 10)
    for name, values in reversed(series.items()):
        svg.path([(x(step), y(value)) for step, value in values], f"raw {css_class(report, name)}")
    for name, values in reversed(smooth.items()):
        svg.path([(x(step), y(value)) for step, value in values], f"curve {css_class(report, name)}")
    for tick in nice_ticks(min(steps), max(steps), 4 if width < _NARROW else 7):
        if min(steps) <= tick <= max(steps):
            svg.text(x(tick), 232, f"{tick:g}", "tick", anchor="middle")
    return svg.render()


def smoothing(report: Report, metric: str) -> int:
    """Return the width of the centred mean: an eighth of the longest curve, at least one point."""
    longest = max((sum(metric in entry for entry in curve) for curve in report.curves.values()), default=0)
    return max(1, longest // 8)


def memory_plot(report: Report, width: float) -> str | None:
    """Bytes that live from step to step, stacked by component."""
    runs = [name for name in report.runs if any(not is_peak(key) for key in report.memory.get(name, {}))]
    if not runs:
        return None
    stacks = {
        name: {words(key): float(value) for key, value in report.memory[name].items() if not is_peak(key)}
        for name in runs
    }
    return _stacked(report, stacks, width, size, "Memory by component")


def time_plot(report: Report, width: float) -> str | None:
    """Time of every run, stacked by stage."""
    runs = [name for name in report.models if name in report.seconds]
    if not runs:
        return None
    stacks = {name: {words(stage): value for stage, value in report.seconds[name].items()} for name in runs}
    return _stacked(report, stacks, width, duration, "Time by stage")


def stack_parts(report: Report, kind: str) -> list[str]:
    """Return the parts of `memory` or `time` in the order in which they are stacked and coloured."""
    source = report.memory if kind == "memory" else report.seconds
    keys = [key for name in report.models for key in source.get(name, {}) if not (kind == "memory" and is_peak(key))]
    return list(dict.fromkeys(words(key) for key in keys))


def _stacked(
    report: Report, stacks: dict[str, dict[str, float]], width: float, write: Callable[[float], str], title: str
) -> str:
    parts = list(dict.fromkeys(key for stack in stacks.values() for key in stack))
    most = max(sum(stack.values()) for stack in stacks.values()) or 1.0
    svg = Svg(width, _TOP + _ROW * len(stacks) + 4, title)
    x = Scale(0, most, _left(width), width - 84)
    for row, (name, stack) in enumerate(stacks.items()):
        y = _TOP + _ROW * (row + 0.5)
        _row_label(svg, report, name, y)
        start = 0.0
        for part, value in stack.items():
            tip = f"{label(report, name)}, {part}: {write(value)}"
            length = x(start + value) - x(start)
            svg.rect(x(start), y - 9, max(length - 1, 0.5), 18, f"part part-{parts.index(part) % 6 + 1}", tip=tip)
            start += value
        svg.text(x(start) + 7, y + 4, write(start), "value")
    return svg.render()


def _rows(
    width: float, count: int, ticks: list[float], write: Callable[[float], str], title: str, *, right: float
) -> tuple[Svg, Scale]:
    """Start a drawing with one row per model over a horizontal axis."""
    bottom = _TOP + _ROW * count
    svg = Svg(width, bottom + _AXIS, title)
    x = Scale(ticks[0], ticks[-1], _left(width), width - right - 12)
    for tick in ticks:
        svg.line(x(tick), _TOP, x(tick), bottom, "grid")
        svg.text(x(tick), bottom + 17, write(tick), "tick", anchor="middle")
    return svg, x


def _upright(
    width: float, height: float, ticks: list[float], write: Callable[[float], str], title: str
) -> tuple[Svg, Scale]:
    """Start a drawing with a vertical axis."""
    svg = Svg(width, height, title)
    y = Scale(ticks[0], ticks[-1], height - 28, 16)
    for tick in ticks:
        svg.line(48, y(tick), width - 8, y(tick), "grid")
        svg.text(40, y(tick) + 4, write(tick), "tick", anchor="end")
    return svg, y


def _band(svg: Svg, x: Scale, low: float, high: float, rows: int) -> None:
    start, end = x(max(low, x.low)), x(min(high, x.high))
    svg.rect(start, _TOP, end - start, _ROW * rows, "band")


def _interval(svg: Svg, x: Scale, y: float, low: float, value: float, high: float, style: str, tip: str) -> None:
    svg.line(x(low), y, x(high), y, f"whisker {style}")
    svg.circle(x(value), y, 5, f"dot {style}", tip=tip)


def _row_label(svg: Svg, report: Report, name: str, y: float) -> None:
    text = label(report, name)
    if svg_is_narrow(svg):
        text = text.removesuffix(" control").removesuffix(" model")
    svg.text(0, y + 4, text, "name")


def svg_is_narrow(svg: Svg) -> bool:
    """Whether a drawing is for a phone."""
    return svg.width < _NARROW


def _left(width: float) -> float:
    return 124.0 if width < _NARROW else 200.0


def _centred_mean(values: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    reach = window // 2
    means = []
    for index, (step, _) in enumerate(values):
        near = [value for _, value in values[max(0, index - reach) : index + reach + 1]]
        means.append((step, sum(near) / len(near)))
    return means


def percent_tick(value: float) -> str:
    """Write a share at an axis."""
    return f"{round(value * 100, 6):g} %"


def points_tick(value: float) -> str:
    """Write a difference in points at an axis."""
    return typographic(f"{round(value * 100, 6):+g}") if value else "0"


def _tick(value: float) -> str:
    return typographic(f"{value:.4g}")
