"""Writes a comparison's three files, each whole or not at all."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from subnet_ft.evidence.comparison import plots, tables
from subnet_ft.evidence.comparison.schema import MethodComparison
from subnet_ft.evidence.report import wording
from subnet_ft.evidence.report.html import figure, templates
from subnet_ft.evidence.report.markdown import escape, table
from subnet_ft.evidence.report.section import Key
from subnet_ft.evidence.report.tables import words
from subnet_ft.evidence.report.write import write_files


def write_comparison(comparison: MethodComparison, folder: str | Path) -> dict[str, Path]:
    """Write `comparison.json`, `.md` and `.html` into a folder, which is made if needed.

    Returns:
        `json`, `md` and `html` to the file's path.
    """
    pages = {"md": render_markdown(comparison), "html": render_html(comparison)}
    return write_files(Path(folder) / "comparison", comparison.to_dict(), pages)


def rule_sentence(comparison: MethodComparison) -> str:
    """Say what the runs have in common and what the intervals are."""
    return (
        f"Every method trained from the same base on the same data, with seed {comparison.seed}, the same batches and "
        f"the same number of steps. {_judged(comparison)} Training "
        "memory is what lives from one step to the next, counted from the tensors. *Beside the base* is what a result "
        "needs in storage when the base is at hand: changed values and one bit per weight, counted, or the adapter's "
        "file."
    )


def _judged(comparison: MethodComparison) -> str:
    if not comparison.num_prompts:
        return "Accuracy was not measured."
    counted = wording.judged_sentence(comparison.judged_on, comparison.num_prompts)
    return f"{counted}, with Wilson's {comparison.confidence * 100:g} % interval; differences are paired, with Tango's."


def render_markdown(comparison: MethodComparison) -> str:
    """Return the comparison as GitHub-flavoured Markdown."""
    blocks = ["# Methods beside each other", f"{escape(comparison.title)}. Written by subnet-ft {comparison.version}."]
    blocks += [table(tables.main_table(comparison)), rule_sentence(comparison)]
    copies = tables.quantized_table(comparison)
    if copies is not None:
        blocks += ["## Quantized copies", table(copies)]
    blocks += ["## Memory", table(tables.memory_table(comparison))]
    blocks += ["## Settings", table(tables.settings_table(comparison))]
    gaps = "\n".join(f"- {escape(gap)}" for gap in comparison.not_measured)
    return "\n\n".join([*blocks, "## What this comparison does not show", gaps]) + "\n"


def render_html(comparison: MethodComparison) -> str:
    """Return the comparison as one page that needs nothing else; every string is escaped."""
    environment = templates("subnet_ft.evidence.comparison", "subnet_ft.evidence.report")
    page = environment.get_template("comparison.html.jinja").render(
        comparison=comparison,
        style=Markup(environment.get_template("style.css").render()),
        judged=_judged(comparison),
        rule=rule_sentence(comparison).replace("*", ""),
        tables={
            "main": tables.main_table(comparison),
            "quantized": tables.quantized_table(comparison),
            "memory": tables.memory_table(comparison),
            "settings": tables.settings_table(comparison),
        },
        figures={
            "accuracy": figure(partial(plots.accuracy_plot, comparison)),
            "memory": figure(partial(plots.memory_plot, comparison)),
        },
        memory_keys=[
            Key(f"part-{index % 6 + 1}", words(part)) for index, part in enumerate(plots.memory_parts(comparison))
        ],
        recipe=json.dumps(comparison.recipe, indent=2, ensure_ascii=False),
        hardware=json.dumps(_hardware(comparison), indent=2, ensure_ascii=False),
    )
    return str(page)


def _hardware(comparison: MethodComparison) -> dict[str, Any]:
    if not comparison.differing_conditions:
        return comparison.environment
    return {result.method: result.environment for result in comparison.methods}
