"""Writes the three files of overlaps, each whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from markupsafe import Markup

from subnet_ft.evidence.overlap import MaskOverlap
from subnet_ft.evidence.overlap_page import summary
from subnet_ft.evidence.report import overlap_plots as plots
from subnet_ft.evidence.report.html import figure, templates
from subnet_ft.evidence.report.markdown import escape, table
from subnet_ft.evidence.report.section import Key
from subnet_ft.evidence.report.write import write_files


def write_overlaps(overlaps: Sequence[MaskOverlap], folder: str | Path, *, version: str) -> dict[str, Path]:
    """Write `overlap.json`, `.md` and `.html` into a folder, which is made if needed.

    Args:
        overlaps: Every pair of some masks, as `overlap_matrix` gives them.
        folder: Where to.
        version: Version of subnet-ft.

    Returns:
        `json`, `md` and `html` to the file's path.
    """
    pages = {"md": render_markdown(overlaps, version), "html": render_html(overlaps, version)}
    return write_files(Path(folder) / "overlap", summary.summary_for_cli(overlaps, version), pages)


def render_markdown(overlaps: Sequence[MaskOverlap], version: str) -> str:
    """Return the overlaps as GitHub-flavoured Markdown."""
    blocks = ["# Overlap of masks", escape(summary.NULLS), table(summary.pairs_table(overlaps))]
    return "\n\n".join([*blocks, f"Written by subnet-ft {version}."]) + "\n"


def render_html(overlaps: Sequence[MaskOverlap], version: str) -> str:
    """Return the overlaps as one page that needs nothing else; every string is escaped."""
    environment = templates("subnet_ft.evidence.overlap_page", "subnet_ft.evidence.report")
    has_magnitude = any(pair.overall.magnitude_o1 is not None for pair in overlaps)
    keys = [Key("m-subnet", "o1, measured"), Key("m-base", "uniform null")]
    page = environment.get_template("overlap.html.jinja").render(
        style=Markup(environment.get_template("style.css").render()),
        num_masks=len({name for pair in overlaps for name in (pair.first, pair.second)}),
        null="magnitude-matched" if has_magnitude else "uniform",
        has_magnitude=has_magnitude,
        nulls=summary.NULLS,
        matrix=figure(partial(plots.matrix_plot, overlaps)),
        against=figure(partial(plots.nulls_plot, overlaps)),
        keys=[*keys, Key("m-control-1", "magnitude-matched null")] if has_magnitude else keys,
        pairs=summary.pairs_table(overlaps),
        tensors=summary.tensors_table(overlaps[0]) if len(overlaps) == 1 else None,
        version=version,
    )
    return str(page)
