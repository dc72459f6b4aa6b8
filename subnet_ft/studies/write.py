"""A study's three files, each whole or not at all, and what a terminal and `--json` show of it."""

from __future__ import annotations

import json
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from subnet_ft.evidence.report import wording
from subnet_ft.evidence.report.html import figure, templates
from subnet_ft.evidence.report.markdown import escape, table
from subnet_ft.evidence.report.overlap_plots import matrix_plot, nulls_plot
from subnet_ft.evidence.report.section import Key
from subnet_ft.evidence.report.summary import aligned
from subnet_ft.evidence.report.write import write_files
from subnet_ft.studies import plots, tables
from subnet_ft.studies.schema import StudyReport

_WIDTH = 100
_FIRST = 3  # sentences of `causes` that speak of all runs together


def write_study(report: StudyReport, folder: Path) -> dict[str, Path]:
    """Write `study.json`, `.md` and `.html` into a folder, which is made if needed.

    Returns:
        `json`, `md` and `html` to the file's path.
    """
    pages = {"md": render_markdown(report), "html": render_html(report)}
    return write_files(folder / "study", report.to_dict(), pages)


def rule_sentence(report: StudyReport) -> str:
    """Say what the runs have in common and what the intervals are."""
    if not report.num_prompts:
        return "Every run starts from the base. Accuracy was not measured."
    counted = wording.judged_sentence(report.judged_on, report.num_prompts)
    level = f"{report.confidence * 100:g} %"
    sentence = f"Every run starts from the base. {counted}, with Wilson's {level} interval; differences are paired"
    sentence += ", with Tango's."
    if any(cell.mask is not None for cell in report.cells):
        sentence += (
            f" Verdicts are by the rule of every report, with a margin of {report.margin * 100:g} points, for each "
            "mask alike."
        )
    return sentence


def render_markdown(report: StudyReport) -> str:
    """Return the study as GitHub-flavoured Markdown."""
    blocks = [f"# {report.question}", f"{escape(report.title)}. Written by subnet-ft {report.version}."]
    blocks.append("\n".join(f"- {escape(sentence)}" for sentence in report.answers))
    blocks += [table(tables.main_table(report)), rule_sentence(report)]
    overlaps, curve = tables.overlap_table(report), tables.tolerance_table(report)
    if overlaps is not None:
        blocks += ["## Overlap", table(overlaps)]
    if curve is not None:
        blocks += ["## Changed weights by tolerance", table(curve)]
    blocks += ["## Settings", table(tables.settings_table(report))]
    gaps = "\n".join(f"- {escape(gap)}" for gap in report.not_measured)
    return "\n\n".join([*blocks, "## What this study does not show", gaps]) + "\n"


def render_html(report: StudyReport) -> str:
    """Return the study as one page that needs nothing else; every string is escaped."""
    environment = templates("subnet_ft.studies", "subnet_ft.evidence.report")
    with_masks = any(cell.mask is not None for cell in report.cells)
    page = environment.get_template("study.html.jinja").render(
        report=report,
        style=Markup(environment.get_template("style.css").render()),
        num_first=_FIRST if report.study == "causes" else len(report.answers),
        rule=rule_sentence(report),
        tables={
            "main": tables.main_table(report),
            "overlap": tables.overlap_table(report),
            "tolerance": tables.tolerance_table(report),
            "settings": tables.settings_table(report),
        },
        figures={
            "changed": None if with_masks else figure(partial(plots.changed_plot, report)),
            "tolerance": figure(partial(plots.tolerance_plot, report)),
            "accuracy": figure(partial(plots.accuracy_plot, report)),
            "difference": figure(partial(plots.difference_plot, report)),
            "sweep": figure(partial(plots.sweep_plot, report)) if report.study == "which_mask" else None,
            "scatter": figure(partial(plots.scatter_plot, report)),
            "recall": figure(partial(plots.recall_plot, report)) if report.study == "early_mask" else None,
            "matrix": figure(partial(matrix_plot, report.overlaps)),
            "nulls": figure(partial(nulls_plot, report.overlaps)),
        },
        keys={
            "tolerance": [
                Key(style, cell.label) for cell, style in zip(plots.curve_cells(report), plots.COLOURS, strict=False)
            ],
            "sweep": [
                Key(style, name.replace("_", " "))
                for name, style in zip(plots.sweep_families(report), plots.COLOURS, strict=False)
            ],
            "nulls": [
                Key("m-subnet", "measured"),
                Key("m-base", "uniform null"),
                Key("m-control-1", "magnitude-matched null"),
            ],
            "recall": [
                Key("m-subnet", "recall of the final mask"),
                Key("m-full", "precision"),
                Key("m-base", "density: the recall of a random mask"),
                Key("m-control-1", "recall of a mask matched on magnitude"),
            ],
        },
        recipe=json.dumps(report.recipe, indent=2, ensure_ascii=False),
        hardware=json.dumps(report.environment, indent=2, ensure_ascii=False),
    )
    return str(page)


def summary_for_cli(report: StudyReport) -> dict[str, Any]:
    """Return the object of `study --json`: the answers, and one entry per run."""
    return {
        "version": report.version,
        "study": report.study,
        "question": report.question,
        "answers": report.answers,
        "num_prompts": report.num_prompts,
        "confidence": report.confidence,
        "base_accuracy": None if report.base is None else report.base.accuracy,
        "cells": [
            {
                "name": cell.name,
                "versus": cell.versus,
                "num_steps": cell.num_steps,
                "learning_rate": cell.learning_rate,
                "density": cell.mask.density if cell.mask else cell.changed.get("0"),
                "changed": cell.changed,
                "accuracy": None if cell.accuracy is None else cell.accuracy.accuracy,
                "ci_low": None if cell.accuracy is None else cell.accuracy.ci_low,
                "ci_high": None if cell.accuracy is None else cell.accuracy.ci_high,
                "difference": None if cell.difference is None else cell.difference.difference,
                "difference_low": None if cell.difference is None else cell.difference.low,
                "difference_high": None if cell.difference is None else cell.difference.high,
                "verdict": cell.mask.verdict if cell.mask else None,
                "recall": cell.mask.recall if cell.mask else None,
                "magnitude_recall": cell.mask.magnitude_recall if cell.mask else None,
                "precision": cell.mask.precision if cell.mask else None,
                "reward": cell.reward,
                "failure": cell.failure,
            }
            for cell in report.cells
        ],
        "overlaps": [
            {
                "first": pair.first,
                "second": pair.second,
                "o1": pair.overall.o1,
                "o2": pair.overall.o2,
                "uniform_o1": pair.overall.uniform_o1,
                "uniform_o2": pair.overall.uniform_o2,
                "magnitude_o1": pair.overall.magnitude_o1,
                "magnitude_o2": pair.overall.magnitude_o2,
            }
            for pair in report.overlaps
        ],
    }


def lines_for_terminal(report: StudyReport) -> list[str]:
    """Return the answers and the tables as lines of text."""
    lines = [report.question, report.title, ""]
    for sentence in report.answers:
        lines += textwrap.wrap(sentence, _WIDTH, initial_indent="  - ", subsequent_indent="    ")
    lines += ["", *aligned(tables.main_table(report))]
    overlaps = tables.overlap_table(report)
    return [*lines, "", *aligned(overlaps)] if overlaps is not None else lines
