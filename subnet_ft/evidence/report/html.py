"""The report as one HTML page that needs nothing else: no script, no font, no image from anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from subnet_ft.evidence.report import curve_plots, mask_plots, plots, tables, wording
from subnet_ft.evidence.report.axes import css_class
from subnet_ft.evidence.report.schema import Report

WIDE, PHONE = 720.0, 340.0
"""Widths that drawings are made for; the style sheet shows the one that fits."""
# What a reader wants to see of a log, the first two that were logged.
_METRICS = ("reward", "rewards/accuracies", "accuracy", "loss")
_METRIC_NAMES = {
    "reward": "Reward",
    "rewards/accuracies": "Share of pairs in which the chosen answer is preferred",
    "accuracy": "Share of pairs in which the chosen completion gets more reward",
    "loss": "Loss",
}


@dataclass(frozen=True)
class Key:
    """One entry of a legend."""

    style: str
    text: str


def templates(*packages: str) -> Environment:
    """Return the templates of these packages; every string that enters one is escaped."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["typographic"] = wording.typographic
    return environment


def render_html(report: Report) -> str:
    """Return the page; every string of the report is escaped."""
    environment = templates("subnet_ft.evidence.report")
    style = environment.get_template("style.css").render()
    page = environment.get_template("report.html.jinja").render(
        report=report,
        style=Markup(style),
        word=wording.headline(report),
        claim=wording.claim(report),
        off_mask=wording.off_mask_sentence(report),
        off_mask_broken=wording.is_mask_broken(report),
        controls=wording.control_sentences(report),
        judged=wording.judged_sentence(report.judged_on, report.num_prompts),
        samples_note=wording.samples_sentence(report),
        rule=wording.rule_sentence(report),
        identity=wording.identity_sentence(report),
        cost=wording.cost_sentence(report),
        facts=_facts(report),
        tables={
            "accuracy": tables.accuracy_table(report),
            "controls": tables.controls_table(report),
            "identity": tables.identity_table(report),
            "movement": tables.movement_table(report),
            "density": tables.density_table(report),
            "memory": tables.memory_table(report),
            "time": tables.time_table(report),
        },
        figures={
            "accuracy": _figure(report, plots.accuracy_plot),
            "difference": _figure(report, plots.difference_plot),
            "identity": _figure(report, plots.identity_plot),
            "density": _figure(report, mask_plots.density_plot),
            "tolerance": _figure(report, mask_plots.tolerance_plot),
            "memory": _figure(report, plots.memory_plot),
            "time": _figure(report, plots.time_plot),
        },
        curves=_curves(report),
        curve_keys=[
            Key(css_class(report, name), wording.label(report, name)) for name in report.runs if name in report.curves
        ],
        memory_keys=_part_keys(plots.stack_parts(report.memory, report)),
        time_keys=_part_keys(plots.time_parts(report)),
        sample_models=[(name, wording.label(report, name)) for name in (report.base, report.full, report.subnet)],
        conditions=wording.conditions(report),
        recipe=_json(report.recipe),
        environment=_json(report.environment),
    )
    return str(page)


def _figure(report: Report, draw: Callable[[Report, float], str | None]) -> Markup | None:
    return figure(partial(draw, report))


def figure(draw: Callable[[float], str | None]) -> Markup | None:
    """Draw for a page and for a phone; the style sheet shows the one that fits."""
    wide, phone = draw(WIDE), draw(PHONE)
    if wide is None or phone is None:
        return None
    # Svg escapes whatever enters it, so its markup is safe as it is.
    return Markup(f'<div class="wide">{wide}</div><div class="phone">{phone}</div>')


def _curves(report: Report) -> list[tuple[str, Markup, int]]:
    found = []
    for metric in _METRICS:

        def draw(report: Report, width: float, metric: str = metric) -> str | None:
            return curve_plots.curves_plot(report, metric, width)

        figure = _figure(report, draw)
        if figure is not None:
            found.append((_METRIC_NAMES[metric], figure, curve_plots.smoothing(report, metric)))
    # The loss of an online algorithm measures no progress: a reward says all.
    return found[:1] if found and found[0][0] == "Reward" else found[:2]


def _part_keys(parts: list[str]) -> list[Key]:
    return [Key(f"part-{index % 6 + 1}", tables.words(part)) for index, part in enumerate(parts)]


def _facts(report: Report) -> list[tuple[str, str]]:
    """Return the few numbers a reader looks for first."""
    facts = []
    if report.accuracy:
        for name in (report.base, report.full, report.subnet):
            if name in report.accuracy:
                facts.append((wording.label(report, name), wording.percent(report.accuracy[name].accuracy)))
    if report.density is not None:
        facts.append(("of the weights trained", wording.percent(report.density.overall)))
    weights = report.weights.get(report.subnet)
    if weights is not None and weights.in_mask_identical:
        facts.append(("of what the full run changed is identical", wording.percent(weights.in_mask_identical["0"])))
    return facts


def _json(value: dict[str, object]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) if value else ""
