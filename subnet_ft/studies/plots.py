"""The drawings of a study, each the answer to one question."""

from __future__ import annotations

import math

from subnet_ft.evidence.report.axes import (
    NARROW,
    TOP,
    Scale,
    bottom_of_rows,
    percent_tick,
    points_tick,
    row_centre,
    row_label,
    rows_over_axis,
    upright,
)
from subnet_ft.evidence.report.plots import interval
from subnet_ft.evidence.report.svg import nice_ticks
from subnet_ft.evidence.report.wording import percent, points, tolerance_text, typographic
from subnet_ft.studies.masks import FINAL
from subnet_ft.studies.plan import AS_WRITTEN
from subnet_ft.studies.schema import CellResult, StudyReport
from subnet_ft.studies.wording import EXACT, PAPER

COLOURS = ("m-full", "m-subnet", "m-control-1", "m-control-2", "m-control-3", "m-base")
"""Classes that colour lines, in their order."""

_CURVE_GROUPS = ("masters", "precision")


def changed_plot(report: StudyReport, width: float) -> str | None:
    """Share of changed weights of every run: a dot for any bit, a ring beyond 1e-5; a band as wide as two seeds."""
    run = [cell for cell in report.cells if cell.changed]
    if not run:
        return None
    ticks = nice_ticks(0, max(cell.changed[EXACT] for cell in run), 4 if width < NARROW else 6)
    svg, x = rows_over_axis(
        width, len(run), ticks, percent_tick, "Share of the weights that every run changed", right=58
    )
    own, seed = report.cell(AS_WRITTEN), report.cell("seed")
    bottom = bottom_of_rows(width, len(run))
    if own is not None and own.changed:
        density = own.changed[EXACT]
        if report.study == "causes" and seed is not None and seed.changed:
            spread = abs(seed.changed[EXACT] - density)
            low, high = x(max(density - spread, ticks[0])), x(min(density + spread, ticks[-1]))
            svg.rect(low, TOP, high - low, bottom - TOP, "band")
        svg.line(x(density), TOP, x(density), bottom, "reference")
    for row, cell in enumerate(run):
        y, style = row_centre(width, row), _style(cell)
        row_label(svg, cell.label, y)
        svg.circle(
            x(cell.changed[PAPER]), y, 5.5, f"ring {style}", tip=f"by more than 1e-5: {percent(cell.changed[PAPER])}"
        )
        svg.circle(x(cell.changed[EXACT]), y, 4.5, f"dot {style}", tip=f"in any bit: {percent(cell.changed[EXACT])}")
        svg.text(width - 2, y + 4, percent(cell.changed[EXACT]), "value", anchor="end")
    return svg.render()


def accuracy_plot(report: StudyReport, width: float) -> str | None:
    """Accuracy of the base and of every run with its own interval; a line at the recipe's full run."""
    found = [(cell.label, cell.accuracy, _style(cell)) for cell in report.cells if cell.accuracy is not None]
    if not found:
        return None
    if report.base is not None:
        found.insert(0, ("base model", report.base, "m-base"))
    low, high = min(entry.ci_low for _, entry, _ in found), max(entry.ci_high for _, entry, _ in found)
    ticks = [tick for tick in nice_ticks(low, high, 4 if width < NARROW else 7) if -1e-9 <= tick <= 1 + 1e-9]
    svg, x = rows_over_axis(width, len(found), ticks, percent_tick, "Accuracy of every run with its interval", right=58)
    own = report.cell(AS_WRITTEN)
    if own is not None and own.accuracy is not None:
        position = x(own.accuracy.accuracy)
        svg.line(position, TOP, position, bottom_of_rows(width, len(found)), "reference")
    for row, (label, entry, style) in enumerate(found):
        y = row_centre(width, row)
        tip = f"{label}: {percent(entry.accuracy)}, {entry.ci_low * 100:.1f} to {entry.ci_high * 100:.1f} %"
        row_label(svg, label, y)
        interval(svg, x, y, entry.ci_low, entry.accuracy, entry.ci_high, style, tip)
        svg.text(width - 2, y + 4, percent(entry.accuracy), "value", anchor="end")
    return svg.render()


def difference_plot(report: StudyReport, width: float) -> str | None:
    """Paired difference of every run to the one it is compared with; a band of one margin around none."""
    found = [(cell, cell.difference) for cell in report.cells if cell.difference is not None]
    if not found:
        return None
    margin = report.margin
    low = min([-margin, *(gap.low for _, gap in found)]) * 1.05
    high = max([margin, *(gap.high for _, gap in found)]) * 1.05
    ticks = nice_ticks(low, high, 4 if width < NARROW else 7)
    title = "Paired difference of every run, in points"
    svg, x = rows_over_axis(width, len(found), ticks, points_tick, title, right=58)
    bottom = bottom_of_rows(width, len(found))
    svg.rect(x(-margin), TOP, x(margin) - x(-margin), bottom - TOP, "band")
    svg.line(x(0), TOP, x(0), bottom, "reference")
    for row, (cell, gap) in enumerate(found):
        y = row_centre(width, row)
        tip = typographic(f"{cell.label}: {points(gap.difference)} points, {points(gap.low)} to {points(gap.high)}")
        row_label(svg, cell.label, y)
        interval(svg, x, y, gap.low, gap.difference, gap.high, _style(cell), tip)
        svg.text(width - 2, y + 4, typographic(points(gap.difference)), "value", anchor="end")
    return svg.render()


def curve_cells(report: StudyReport) -> list[CellResult]:
    """Return the runs whose density is drawn against tolerance: where precision is what differs."""
    wanted = [
        cell for cell in report.cells if cell.changed and (cell.group in _CURVE_GROUPS or cell.name == AS_WRITTEN)
    ]
    return wanted[: len(COLOURS)] if report.study == "causes" and len(wanted) > 1 else []


def tolerance_plot(report: StudyReport, width: float) -> str | None:
    """Share of changed weights by tolerance, one line per run."""
    cells = curve_cells(report)
    if not cells:
        return None
    keys = list(cells[0].changed)
    ticks = nice_ticks(0, max(share for cell in cells for share in cell.changed.values()), 4)
    svg, y = upright(width, 230, ticks, percent_tick, "Share of changed weights by tolerance")
    x = Scale(-0.5, len(keys) - 0.5, 48, width - 8)
    for cell, style in zip(cells, COLOURS, strict=False):
        svg.path([(x(index), y(cell.changed[key])) for index, key in enumerate(keys)], f"curve {style}")
        for index, key in enumerate(keys):
            tip = f"{cell.label}, {tolerance_text(key, 'exact')}: {percent(cell.changed[key])}"
            svg.circle(x(index), y(cell.changed[key]), 3.5, f"dot {style}", tip=tip)
    for index, key in enumerate(keys):
        svg.text(x(index), 222, typographic(tolerance_text(key, "exact")), "tick", anchor="middle")
    return svg.render()


def sweep_families(report: StudyReport) -> dict[str, list[CellResult]]:
    """Return the runs of the density sweep by source, those of the final mask's own density included."""
    families: dict[str, list[CellResult]] = {}
    for cell in report.cells:
        if cell.mask is None or cell.accuracy is None:
            continue
        families.setdefault(cell.name.partition("_0.")[0], []).append(cell)
    return {name: cells for name, cells in families.items() if len(cells) > 1}


def sweep_plot(report: StudyReport, width: float) -> str | None:
    """Accuracy against density on a logarithmic axis, one line per source; dashed the full run."""
    families = sweep_families(report)
    found = [cell for cells in families.values() for cell in cells]
    if not found:
        return None
    base, own = report.base, report.cell(AS_WRITTEN)
    levels = [cell.accuracy.accuracy for cell in found if cell.accuracy]
    levels += [entry.accuracy for entry in (base, own.accuracy if own else None) if entry is not None]
    densities = [cell.mask.density for cell in found if cell.mask]
    ticks = nice_ticks(min(levels), max(levels), 5)
    svg, y = upright(width, 250, ticks, percent_tick, "Accuracy against the density of the mask")
    powers = range(math.floor(math.log10(min(densities)) + 1e-9), math.ceil(math.log10(max(densities)) - 1e-9) + 1)
    x = Scale(powers[0], powers[-1], 60, width - 16)
    for entry, style in ((own.accuracy if own else None, "reference"), (base, "grid")):
        if entry is not None:
            svg.line(48, y(entry.accuracy), width - 8, y(entry.accuracy), style)
    for (_, cells), style in zip(families.items(), COLOURS, strict=False):
        spots = sorted(
            (math.log10(cell.mask.density), cell.accuracy.accuracy, cell.label)
            for cell in cells
            if cell.mask and cell.accuracy
        )
        svg.path([(x(place), y(level)) for place, level, _ in spots], f"curve {style}")
        for place, level, label in spots:
            svg.circle(x(place), y(level), 4, f"dot {style}", tip=f"{label}: {percent(level)}")
    for power in powers:
        svg.text(x(power), 242, percent_tick(10.0**power), "tick", anchor="middle")
    return svg.render()


def scatter_plot(report: StudyReport, width: float) -> str | None:
    """Accuracy against the share of the final mask that a mask of its size holds."""
    found = [
        cell
        for cell in report.cells
        if cell.mask is not None
        and cell.mask.recall is not None
        and cell.accuracy is not None
        and not cell.group.startswith("at ")
    ]
    if report.study != "which_mask" or len(found) < 3:
        return None
    levels = [bound for cell in found if cell.accuracy for bound in (cell.accuracy.ci_low, cell.accuracy.ci_high)]
    ticks = nice_ticks(min(levels), max(levels), 5)
    svg, y = upright(width, 260, ticks, percent_tick, "Accuracy against the share of the final mask that a mask holds")
    x = Scale(0, 1, 60, width - 24)
    own = report.cell(AS_WRITTEN)
    if own is not None and own.accuracy is not None:
        svg.line(48, y(own.accuracy.accuracy), width - 8, y(own.accuracy.accuracy), "reference")
    for cell in found:
        if cell.mask is None or cell.mask.recall is None or cell.accuracy is None:
            continue
        place, entry, style = x(cell.mask.recall), cell.accuracy, _style(cell)
        svg.line(place, y(entry.ci_low), place, y(entry.ci_high), f"whisker {style}")
        tip = f"{cell.label}: holds {percent(cell.mask.recall)}, accuracy {percent(entry.accuracy)}"
        if cell.mask.magnitude_recall is not None:
            tip += f"; matched on magnitude it would hold {percent(cell.mask.magnitude_recall)}"
            svg.circle(x(cell.mask.magnitude_recall), y(entry.accuracy), 5.5, f"ring {style}", tip=tip)
        svg.circle(place, y(entry.accuracy), 4.5, f"dot {style}", tip=tip)
    for share in (0, 0.25, 0.5, 0.75, 1):
        svg.text(x(share), 252, percent_tick(share), "tick", anchor="middle")
    return svg.render()


def recall_plot(report: StudyReport, width: float) -> str | None:
    """Recall, precision and density of the mask of every step that was looked at."""
    found = [cell.mask for cell in report.cells if cell.mask is not None and cell.mask.step is not None]
    if not found:
        return None
    svg, y = upright(width, 240, [0, 0.25, 0.5, 0.75, 1], percent_tick, "Recall and precision of the mask by step")
    steps = [mask.step for mask in found if mask.step is not None]
    last = max(max(steps), *(cell.num_steps for cell in report.cells if cell.name == AS_WRITTEN))
    x = Scale(0, last, 48, width - 16)
    for name, style in (
        ("recall", "m-subnet"),
        ("precision", "m-full"),
        ("density", "m-base"),
        ("magnitude_recall", "m-control-1"),
    ):
        spots = [(mask.step, getattr(mask, name)) for mask in found if getattr(mask, name) is not None]
        svg.path([(x(step or 0), y(value)) for step, value in spots], f"curve {style}")
        what = name.replace("magnitude_recall", "recall matched on magnitude")
        for step, value in spots:
            svg.circle(x(step or 0), y(value), 4, f"dot {style}", tip=f"step {step}, {what}: {percent(value)}")
    for step in sorted({0, *steps, last}):
        svg.text(x(step), 232, f"{step}", "tick", anchor="middle")
    return svg.render()


def _style(cell: CellResult) -> str:
    if cell.name == AS_WRITTEN:
        return "m-full"
    if cell.name == FINAL:
        return "m-subnet"
    if cell.group in ("seed", "precision", "control of the final mask", "control"):
        return "m-control-1"
    return "m-control-2" if cell.group.startswith("at ") else "m-subnet" if cell.mask is None else "m-control-3"
