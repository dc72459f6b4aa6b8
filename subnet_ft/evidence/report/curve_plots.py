"""Drawings of training: one logged quantity of every run over the steps."""

from __future__ import annotations

from subnet_ft.evidence.report.axes import NARROW, Scale, css_class, upright
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.svg import nice_ticks
from subnet_ft.evidence.report.wording import typographic


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
    for tick in nice_ticks(min(steps), max(steps), 4 if width < NARROW else 7):
        if min(steps) <= tick <= max(steps):
            svg.text(x(tick), 232, f"{tick:g}", "tick", anchor="middle")
    return svg.render()


def smoothing(report: Report, metric: str) -> int:
    """Return the width of the centred mean: an eighth of the longest curve, at least one point."""
    longest = max((sum(metric in entry for entry in curve) for curve in report.curves.values()), default=0)
    return max(1, longest // 8)


def _centred_mean(values: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    reach = window // 2
    means = []
    for index, (step, _) in enumerate(values):
        near = [value for _, value in values[max(0, index - reach) : index + reach + 1]]
        means.append((step, sum(near) / len(near)))
    return means


def _tick(value: float) -> str:
    return typographic(f"{value:.4g}")
