"""Drawings of lines: one logged quantity of every run over the steps, shares by step, values by rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from subnet_ft.evidence.report.axes import NARROW, Scale, css_class, upright
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.svg import nice_ticks
from subnet_ft.evidence.report.wording import label, typographic


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
    svg, y = upright(width, 240, ticks, _tick, f"{metric} of every run by step")
    x = Scale(min(steps), max(steps), 48, width - 10)
    for name, values in reversed(series.items()):
        svg.path([(x(step), y(value)) for step, value in values], f"raw {css_class(report, name)}")
    for name, values in reversed(smooth.items()):
        svg.path([(x(step), y(value)) for step, value in values], f"curve {css_class(report, name)}")
        svg.note(f"{label(report, name)}: from {values[0][1]:.3g} to {values[-1][1]:.3g}")
    for tick in nice_ticks(min(steps), max(steps), 4 if width < NARROW else 7):
        if min(steps) <= tick <= max(steps):
            svg.text(x(tick), 232, f"{tick:g}", "tick", anchor="middle")
    return svg.render()


def lines_plot(
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    width: float,
    *,
    title: str,
    write: Callable[[float], str],
    write_x: Callable[[float], str],
    has_dots: bool = False,
) -> str | None:
    """Draw lines over an axis that starts at 0.

    Args:
        lines: Class that colours a line, and its (x, y); lines without points are left out.
        width: Of the drawing.
        title: What it shows.
        write: y to text at the axis.
        write_x: x to text at the axis.
        has_dots: Whether every point has a dot that shows its value under the pointer.
    """
    drawn = [(style, points) for style, points in lines if points]
    if not drawn:
        return None
    ticks = nice_ticks(0, max(y for _, points in drawn for _, y in points) or 1.0, 5)
    svg, scale = upright(width, 240, ticks, write, title)
    horizontal = [x for _, points in drawn for x, _ in points]
    across = Scale(min(horizontal), max(horizontal), 54, width - 18)
    for style, points in reversed(drawn):
        svg.path([(across(x), scale(y)) for x, y in points], f"curve {style}")
        if not has_dots:
            svg.note(f"from {write(points[0][1])} to {write(points[-1][1])}")
        for x, y in points if has_dots else ():
            svg.circle(across(x), scale(y), 3, f"dot {style}", tip=f"{write_x(x)}: {write(y)}")
    for tick in nice_ticks(min(horizontal), max(horizontal), 4 if width < NARROW else 7):
        if min(horizontal) <= tick <= max(horizontal):
            svg.text(across(tick), 232, write_x(tick), "tick", anchor="middle")
    return svg.render()


def smoothing(report: Report, metric: str) -> int:
    """Return the width of the centred mean: an eighth of the longest curve, at least one point."""
    longest = max((sum(metric in entry for entry in curve) for curve in report.curves.values()), default=0)
    return max(1, longest // 8)


def last_value(report: Report, metric: str, name: str) -> float | None:
    """Return where a run's bold line ends."""
    values = [(entry["step"], entry[metric]) for entry in report.curves.get(name, []) if metric in entry]
    return _centred_mean(values, smoothing(report, metric))[-1][1] if len(values) >= 2 else None


def _centred_mean(values: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    reach = window // 2
    means = []
    for index, (step, _) in enumerate(values):
        near = [value for _, value in values[max(0, index - reach) : index + reach + 1]]
        means.append((step, sum(near) / len(near)))
    return means


def _tick(value: float) -> str:
    return typographic(f"{value:.4g}")
