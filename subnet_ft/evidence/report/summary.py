"""The report in short: what `verify --json` prints and what a terminal shows."""

from __future__ import annotations

import textwrap
from typing import Any

from subnet_ft.evidence.report import tables, wording
from subnet_ft.evidence.report.schema import Report

_WIDTH = 100


def summary_for_cli(report: Report) -> dict[str, Any]:
    """Return the object of `verify --json`.

    `control_verdict` and `above_control` are those of the control that speaks most against the subnetwork, `control`;
    `controls` has all of them. What was not measured is null.
    """
    weights = report.weights.get(report.subnet)
    first = report.controls[0] if report.controls else None

    def above(name: str | None) -> str | None:
        return report.above_control[name].answer if name in report.above_control else None

    return {
        "version": report.version,
        "verdict": report.verdict,
        "verdict_reason": report.verdict_reason,
        "off_mask_changed": weights.off_mask_changed if weights else None,
        "mask_changed_share": weights.mask_changed_share if weights else None,
        "in_mask_identical": weights.in_mask_identical if weights else None,
        "identical": weights.identical if weights else None,
        "base_identical": weights.base_identical if weights else None,
        "relative_distance": weights.relative_distance if weights else None,
        "density": report.density.overall if report.density else None,
        "accuracy": {name: entry.accuracy for name, entry in report.accuracy.items()},
        "num_prompts": report.num_prompts,
        "margin": report.margin,
        "confidence": report.confidence,
        "control": first,
        "control_verdict": report.control_verdicts[first].name if first else None,
        "above_control": above(first),
        "controls": {
            name: {"verdict": report.control_verdicts[name].name, "above_control": above(name)}
            for name in report.controls
        },
    }


def lines_for_terminal(report: Report) -> list[str]:
    """Return the report's main sentences and tables as lines of text."""
    lines = [f"Verdict: {wording.headline(report).lower()}"]
    points = [report.verdict_reason, wording.off_mask_sentence(report), *wording.control_sentences(report)]
    points += [sentence for sentence in (wording.identity_sentence(report), wording.cost_sentence(report)) if sentence]
    for point in points:
        lines += textwrap.wrap(point, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    contents = [tables.accuracy_table(report), tables.controls_table(report), tables.movement_table(report)]
    for content in contents:
        if content is not None:
            lines += ["", *aligned(content)]
    return lines


def aligned(content: tables.Table) -> list[str]:
    """Lay out a table as lines of text."""
    rows = [[cell.replace("\u2013", "-") for cell in row] for row in (content.header, *content.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(content.header))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines
