"""The tables of a study, as text cells: Markdown, HTML and the terminal only lay them out."""

from __future__ import annotations

from subnet_ft.evidence.report.tables import Table, accuracy_cell, difference_cell
from subnet_ft.evidence.report.wording import duration, percent
from subnet_ft.studies.schema import StudyReport
from subnet_ft.studies.wording import EXACT, PAPER

_NONE = "\u2013"
_TOLERANCES = (EXACT, "1e-08", PAPER)


def main_table(report: StudyReport) -> Table:
    """What the study is about, one row per run."""
    if report.study == "sparsity":
        return _sparsity(report)
    return _masks(report) if report.study in ("which_mask", "early_mask") else _runs(report)


def settings_table(report: StudyReport) -> Table:
    """What every run differed in, and what it took."""
    rows = [
        [
            cell.label,
            cell.algorithm,
            _NONE if cell.learning_rate is None else f"{cell.learning_rate:g}",
            str(cell.num_steps) if cell.num_steps else _NONE,
            str(cell.seed),
            cell.dtype,
            _NONE if cell.train_seconds is None else duration(cell.train_seconds),
            "; ".join(cell.settings) or "as written",
        ]
        for cell in report.cells
    ]
    return Table(["run", "algorithm", "learning rate", "steps", "seed", "weights", "training", "departs in"], rows)


def tolerance_table(report: StudyReport) -> Table | None:
    """Share of changed weights by tolerance."""
    run = [cell for cell in report.cells if cell.changed]
    if not run:
        return None
    tolerances = list(run[0].changed)
    header = ["changed by more than", *("any bit" if float(key) == 0 else f"{float(key):g}" for key in tolerances)]
    return Table(header, [[cell.label, *(percent(cell.changed[key], 2) for key in tolerances)] for cell in run])


def overlap_table(report: StudyReport) -> Table | None:
    """Every pair of masks beside both nulls."""
    if not report.overlaps:
        return None
    labels = {cell.name: cell.label for cell in report.cells}
    header = [
        "masks A and B",
        "in B of A",
        "in A of B",
        "uniform",
        "magnitude-matched",
        "times uniform",
        "times matched",
    ]
    rows = []
    for pair in report.overlaps:
        found = pair.overall
        rows.append(
            [
                f"{labels[pair.first]} / {labels[pair.second]}",
                _share(found.o1),
                _share(found.o2),
                f"{_share(found.uniform_o1)} / {_share(found.uniform_o2)}",
                f"{_share(found.magnitude_o1)} / {_share(found.magnitude_o2)}",
                _NONE if found.lift is None else f"{found.lift:.2f}",
                _NONE if found.magnitude_lift is None else f"{found.magnitude_lift:.2f}",
            ]
        )
    return Table(header, rows)


def _sparsity(report: StudyReport) -> Table:
    header = [
        "algorithm",
        "unchanged, exactly",
        "at 1e-8",
        "at 1e-5",
        "on-policy",
        "KL",
        "online",
        "learns from",
        "learning rate",
        "steps",
        _accuracy_header(report),
    ]
    rows = []
    for cell in report.cells:
        traits = cell.traits
        flags = [traits.on_policy, traits.kl, traits.online] if traits else []
        rows.append(
            [
                cell.label,
                *(percent(1 - cell.changed[key]) if cell.changed else _NONE for key in _TOLERANCES),
                *(("yes" if flag else "no") for flag in flags),
                traits.learns_from if traits else _NONE,
                _NONE if cell.learning_rate is None else f"{cell.learning_rate:g}",
                str(cell.num_steps),
                accuracy_cell(cell.accuracy),
            ]
        )
    return Table(header, rows)


def _runs(report: StudyReport) -> Table:
    with_data = any(cell.data_loss is not None for cell in report.cells)
    header = [
        "run",
        "changed, exactly",
        "by more than 1e-5",
        _accuracy_header(report),
        "minus its reference, points",
        "late reward",
        *(["nats per token of its data"] if with_data else []),
    ]
    rows = [
        [
            cell.label,
            *(percent(cell.changed[key], 2) if cell.changed else _NONE for key in (EXACT, PAPER)),
            accuracy_cell(cell.accuracy),
            difference_cell(cell.difference),
            _NONE if cell.reward is None else f"{cell.reward:.3f}",
            *([_NONE if cell.data_loss is None else f"{cell.data_loss:.2f}"] if with_data else []),
        ]
        for cell in report.cells
    ]
    return Table(header, rows)


def _masks(report: StudyReport) -> Table:
    header = [
        "mask",
        "density",
        "of the final mask",
        "matched on magnitude",
        "in the final mask",
        "of it changed",
        _accuracy_header(report),
        "minus full run, points",
        "verdict",
        "identical where the full run changed",
        "distance to the full run",
    ]
    rows = []
    for cell in report.cells:
        mask = cell.mask
        rows.append(
            [
                "full run" if mask is None and cell.versus is None else cell.label,
                percent(mask.density, 2) if mask else _NONE,
                _share(mask.recall) if mask else _NONE,
                _share(mask.magnitude_recall) if mask else _NONE,
                _share(mask.precision) if mask else _NONE,
                _share(mask.changed_share) if mask else _NONE,
                accuracy_cell(cell.accuracy),
                difference_cell(cell.difference),
                mask.verdict.replace("_", " ") if mask and cell.accuracy else _NONE,
                _share(mask.in_mask_identical) if mask else _NONE,
                f"{mask.relative_distance:.3f}" if mask and mask.relative_distance is not None else _NONE,
            ]
        )
    return Table(header, rows)


def _accuracy_header(report: StudyReport) -> str:
    return f"accuracy [{report.confidence * 100:g} %]"


def _share(share: float | None) -> str:
    return _NONE if share is None else percent(share)
