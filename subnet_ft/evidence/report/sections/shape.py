"""The shape of mask and update: clustering in rows, columns and heads, and the spectrum of what was added."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, median

from subnet_ft.evidence.report.axes import percent_tick
from subnet_ft.evidence.report.curve_plots import lines_plot
from subnet_ft.evidence.report.row_plots import Mark, Row, rows_plot
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.section import Figure, Key, Section
from subnet_ft.evidence.report.tables import Table, short_kind
from subnet_ft.evidence.report.wording import MISSING, percent, shortened, skipped_matrices
from subnet_ft.evidence.spectra import Spectra, Spectrum
from subnet_ft.evidence.structure import Structure, TensorStructure
from subnet_ft.masks.density import layer_and_kind

# Ranks that differ by less of full are called the same.
_ALIKE = 0.05
_AXES = (("rows", "part-1"), ("columns", "part-3"), ("heads", "part-6"))


def structure(report: Report) -> Section | None:
    """How much wider the densities of rows, columns and heads spread than random draws would."""
    found = report.structure
    if found is None or not found.by_kind:
        return None
    said = []
    for axis, _ in _AXES:
        own, matched = _typical(found, axis), None if found.control is None else _typical(found.control, axis)
        if own is not None:
            beside = "" if matched is None else f" (magnitude-matched control {matched:.1f})"
            said.append(f"{axis} {own:.1f}{beside}")
    figure = Figure(
        "structure-spread",
        "Do the trained weights cluster in rows, columns or heads?",
        f"Times as wide as independent draws, in the median kind of matrix: {', '.join(said)}." if said else "",
        partial(_spread_plot, found),
        "How many times wider the densities of rows, columns and heads spread than independent draws of as many "
        "weights; 1, the line, is no structure. Rings: the magnitude-matched control, whose clusters are those of |w| "
        "alone.",
        keys=[Key(style, axis) for axis, style in _AXES if _typical(found, axis) is not None],
        mark="dot",
        table=_spread_table(found),
    )
    return Section("structure", "Structure", [figure])


def _spread(entry: TensorStructure | None, axis: str) -> float | None:
    spread = None if entry is None else getattr(entry, axis)
    return None if spread is None or spread.variance_ratio is None else math.sqrt(spread.variance_ratio)


def _typical(found: Structure, axis: str) -> float | None:
    values = [value for entry in found.by_kind.values() if (value := _spread(entry, axis)) is not None]
    return median(values) if values else None


def _spread_plot(found: Structure, width: float) -> str | None:
    rows = []
    for kind, entry in found.by_kind.items():
        control = None if found.control is None else found.control.by_kind.get(kind)
        marks, most = [], 0.0
        for axis, style in _AXES:
            own, matched = _spread(entry, axis), _spread(control, axis)
            if matched is not None:
                marks.append(Mark(matched, style, f"{short_kind(kind)}, {axis}, control: {matched:.2f}"))
            if own is not None:
                marks.append(Mark(own, style, f"{short_kind(kind)}, {axis}: {own:.2f}", "dot"))
                most = max(most, own)
        if most:
            rows.append(Row(short_kind(kind), "", None, f"{most:.1f}\u00d7", marks=marks))
    title = "Spread of densities over that of independent draws"
    return rows_plot(rows, width, title=title, write="{:g}".format, within=(0,), reference=1.0)


def _spread_table(found: Structure) -> Table:
    rows = []
    for kind, entry in found.by_kind.items():
        control = None if found.control is None else found.control.by_kind.get(kind)
        cells = []
        for axis, _ in _AXES:
            own, matched = _spread(entry, axis), _spread(control, axis)
            cells.append("\u2013" if own is None else f"{own:.2f}" + ("" if matched is None else f" ({matched:.2f})"))
        gini = MISSING if entry.rows is None or entry.rows.gini is None else f"{entry.rows.gini:.2f}"
        rows.append([short_kind(kind), *cells, gini, percent(entry.empty_tiles), percent(entry.empty_tiles_expected)])
    header = ["times wider (control)", "rows", "columns", "heads", "Gini of rows", "empty tiles", "expected"]
    return Table(header, rows)


def spectra(report: Report) -> Section | None:
    """Rank, energy and direction of the full run's update, beside those of a control's."""
    found = report.spectra
    matrices = [] if found is None else [entry for entry in found.matrices if entry.profile]
    if found is None or not matrices:
        return None
    kinds = list(dict.fromkeys(_kind(entry) for entry in matrices))
    of = "a run of its own" if found.control == "run" else "the same changes in other places of the same magnitude"
    looked = "of the first, middle and last layer" if found.sampled else "of every matrix"
    if len(matrices) < len(found.matrices) or found.skipped:
        looked += " but those named below"
    shared = f"Means by kind, {looked}. Rings: the magnitude-matched control, {of}."
    control_key = Key("m-control-1", "control")
    figures = [
        Figure(
            "spectra-energy",
            "Is the update low-rank?",
            f"The update\u2019s rank is {percent(_mean(matrices, _rank))} of full on average (control "
            f"{percent(_mean(_controls(matrices), _rank))}){_beside_control(matrices)}. 99 % of its "
            f"energy takes {percent(_mean(matrices, _energy))} of the singular values (control "
            f"{percent(_mean(_controls(matrices), _energy))}).",
            partial(
                _kinds_plot, matrices, kinds, "Share of singular values that hold 99 % of the energy", _energy, None
            ),
            f"Share of the singular values that hold 99 % of the squared norm. {shared}",
            keys=[Key("m-full", "full run\u2019s update"), control_key],
            mark="dot",
            table=_spectra_table(matrices, kinds),
        ),
        Figure(
            "spectra-profile",
            "How fast do the singular values fall?",
            f"The middle singular value is {_mean(matrices, _middle):.2f} of the largest (control "
            f"{_text(_mean(_controls(matrices), _middle))}).",
            partial(_profile_plot, matrices),
            "Singular values over the largest, from the first to the last, mean over matrices.",
            keys=[Key("m-full", "full run\u2019s update"), control_key],
            mark="stroke",
        ),
        Figure(
            "spectra-principal",
            "Does the update follow the base\u2019s main directions?",
            f"The update\u2019s leading directions lie to {percent(_mean(matrices, _principal))} in the base\u2019s; "
            "random ones "
            "would to "
            f"{percent(_mean(matrices, _expected))}, the control\u2019s do to "
            f"{percent(_mean(_controls(matrices), _principal))}.",
            partial(
                _kinds_plot, matrices, kinds, "Share of the update's directions in the base's", _principal, _expected
            ),
            f"Mean squared cosine of the leading 5 % of directions with those of the base weight. {shared}",
            keys=[Key("m-full", "full run\u2019s update"), control_key, Key("m-base", "random directions")],
            mark="dot",
        ),
    ]
    return Section("spectra", "Spectra", figures, _left_out(found))


def _beside_control(matrices: Sequence[Spectrum]) -> str:
    """Say what the rank means beside the control's, which has as many changes of the same size in other places."""
    own, control = _mean(matrices, _rank), _mean(_controls(matrices), _rank)
    if own is None or control is None:
        return ""
    if abs(own - control) <= _ALIKE:
        return ", so it is what as many changes in other places give, too"
    return f", so it is {'lower' if own < control else 'higher'} than as many changes in other places give"


def _left_out(found: Spectra) -> list[str]:
    """Name the matrices that are in no figure of the section."""
    still = [entry.name for entry in found.matrices if not entry.profile]
    notes = [f"Left out: {skipped_matrices(found)}."] if found.skipped else []
    return notes + ([f"Left out, as nothing in them changed: {shortened(still)}."] if still else [])


def _kind(entry: Spectrum) -> str:
    return layer_and_kind(entry.name.partition("[")[0])[1]


def _controls(matrices: Sequence[Spectrum]) -> list[Spectrum]:
    return [entry.control for entry in matrices if entry.control is not None]


def _rank(entry: Spectrum) -> float | None:
    return entry.rank_share


def _energy(entry: Spectrum) -> float | None:
    return None if entry.energy_rank_99 is None else entry.energy_rank_99 / min(entry.shape)


def _principal(entry: Spectrum) -> float | None:
    return entry.principal_overlap


def _expected(entry: Spectrum) -> float | None:
    return entry.principal_expected


def _middle(entry: Spectrum) -> float | None:
    return entry.profile[len(entry.profile) // 2] if entry.profile else None


def _mean(matrices: Sequence[Spectrum], figure: Callable[[Spectrum], float | None]) -> float | None:
    values = [value for entry in matrices if (value := figure(entry)) is not None]
    return fmean(values) if values else None


def _text(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _kinds_plot(
    matrices: Sequence[Spectrum],
    kinds: Sequence[str],
    title: str,
    figure: Callable[[Spectrum], float | None],
    null: Callable[[Spectrum], float | None] | None,
    width: float,
) -> str | None:
    rows = []
    for kind in kinds:
        own = [entry for entry in matrices if _kind(entry) == kind]
        value, control = _mean(own, figure), _mean(_controls(own), figure)
        random = None if null is None else _mean(own, null)
        if value is None:
            continue
        marks = [
            Mark(at, style, f"{short_kind(kind)}, {name}: {percent(at)}")
            for at, style, name in ((random, "m-base", "random"), (control, "m-control-1", "control"))
            if at is not None
        ]
        tip = f"{short_kind(kind)}: {percent(value)}"
        rows.append(Row(short_kind(kind), "m-full", value, percent(value), marks=marks, tip=tip))
    return rows_plot(rows, width, title=title, write=percent_tick, within=(0,), limits=(0, 1))


def _profile_plot(matrices: Sequence[Spectrum], width: float) -> str | None:
    lines = []
    for style, entries in (("m-full", matrices), ("m-control-1", _controls(matrices))):
        profiles = [entry.profile for entry in entries if entry.profile]
        length = min((len(profile) for profile in profiles), default=0)
        points = [
            (index / max(length - 1, 1), fmean(profile[index] for profile in profiles)) for index in range(length)
        ]
        lines.append((style, points))
    title = "Singular values over the largest"
    return lines_plot(lines, width, title=title, write="{:g}".format, write_x=percent_tick)


def _spectra_table(matrices: Sequence[Spectrum], kinds: Sequence[str]) -> Table:
    rows = []
    for kind in kinds:
        own = [entry for entry in matrices if _kind(entry) == kind]
        control = _controls(own)
        stable = [_mean(part, lambda entry: entry.stable_rank) for part in (own, control)]
        rows.append(
            [
                short_kind(kind),
                f"{percent(_mean(own, _rank))} ({percent(_mean(control, _rank))})",
                f"{_stable(stable[0])} ({_stable(stable[1])})",
                f"{percent(_mean(own, _energy))} ({percent(_mean(control, _energy))})",
                f"{percent(_mean(own, _principal))} ({percent(_mean(control, _principal))})",
                percent(_mean(own, _expected)),
            ]
        )
    return Table(["(control)", "rank", "stable rank", "99 % energy", "in base\u2019s directions", "random"], rows)


def _stable(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"
