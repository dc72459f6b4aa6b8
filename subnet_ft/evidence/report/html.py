"""The report as one HTML page that needs nothing else: no script, no font, no image from anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from subnet_ft.evidence.report import wording
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.section import Figure
from subnet_ft.evidence.report.sections import sections_of

WIDE, PHONE, PANEL = 720.0, 340.0, 330.0
"""Widths that drawings are made for; the style sheet shows the one that fits. Panels have one width."""


@dataclass(frozen=True)
class Drawn:
    """A figure with its drawings as markup."""

    figure: Figure
    drawing: Markup | None
    panels: list[tuple[str, Markup]]


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
        samples_note=wording.samples_sentence(report),
        cost=wording.cost_sentence(report),
        facts=_facts(report),
        sections=[(section, [_drawn(entry) for entry in section.figures]) for section in sections_of(report)],
        sample_models=[(name, wording.label(report, name)) for name in (report.base, report.full, report.subnet)],
        conditions=wording.conditions(report),
        recipe=_json(report.recipe),
        environment=_json(report.environment),
    )
    return str(page)


def _drawn(entry: Figure) -> Drawn:
    panels = [(panel.title, Markup(panel.draw(PANEL) or "")) for panel in entry.panels]
    return Drawn(entry, None if entry.draw is None else figure(entry.draw), panels)


def figure(draw: Callable[[float], str | None]) -> Markup | None:
    """Draw for a page and for a phone; the style sheet shows the one that fits."""
    wide, phone = draw(WIDE), draw(PHONE)
    if wide is None or phone is None:
        return None
    # Svg escapes whatever enters it, so its markup is safe as it is.
    return Markup(f'<div class="wide">{wide}</div><div class="phone">{phone}</div>')


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
