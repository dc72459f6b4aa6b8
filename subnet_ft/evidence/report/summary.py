"""The report in short: what `verify --json` prints and what a terminal shows."""

from __future__ import annotations

import textwrap
from typing import Any

from subnet_ft.evidence.report import tables, wording
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.sections import sections_of

_WIDTH = 100
# Sections whose answers a terminal shows; of the others it shows sentences and tables above them.
_FURTHER = frozenset(
    {"seeds", "agreement", "retention", "scatter", "floor", "overlap", "structure", "spectra", "dynamics"}
)


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
        "seeds": {entry.run: entry.verdict for entry in report.seeds_summary},
        "kl_to_full": {name: entry.kl for name, entry in report.agreement.items()},
        "same_completion": {name: entry.same_completion for name, entry in report.agreement.items()},
        "retention": {
            name: {
                "kl_to_base": entry.kl_to_base,
                "accuracy": {task: kept.accuracy for task, kept in entry.tasks.items()},
            }
            for name, entry in report.retention.items()
        },
        "floor": None
        if report.floor is None
        else {
            "in_mask_identical": report.floor.weights.in_mask_identical,
            "relative_distance": report.floor.weights.relative_distance,
        },
        "costs": {
            cost.run: {
                "needs": cost.needs,
                "train_seconds": cost.train_seconds,
                "first_seconds": cost.first_seconds,
                "peak_bytes": cost.peak_bytes,
                "peak_of": cost.peak_of,
                "first_peak_bytes": cost.first_peak_bytes,
                "bytes_per_weight": cost.bytes_per_weight,
            }
            for cost in report.costs
        },
    }


def lines_for_terminal(report: Report) -> list[str]:
    """Return the report's main sentences and tables as lines of text."""
    lines = [f"Verdict: {wording.headline(report).lower()}"]
    points = [report.verdict_reason, wording.off_mask_sentence(report), *wording.control_sentences(report)]
    points += [sentence for sentence in (wording.identity_sentence(report), wording.cost_sentence(report)) if sentence]
    for point in points:
        lines += _wrapped(point)
    contents = [tables.accuracy_table(report), tables.controls_table(report), tables.movement_table(report)]
    for content in contents:
        if content is not None:
            lines += ["", *aligned(content)]
    further = [section for section in sections_of(report) if section.id in _FURTHER]
    for section in further:
        said = f"{section.title}. {' '.join(figure.answer for figure in section.figures if figure.answer)}"
        lines += ["", *_wrapped(said)]
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


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
