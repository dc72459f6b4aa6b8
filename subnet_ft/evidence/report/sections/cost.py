"""What the runs cost: memory from step to step, time by stage, and the whole way with the run that made the mask."""

from __future__ import annotations

from functools import partial

from subnet_ft.evidence.cost import PeakOf
from subnet_ft.evidence.report import plots, tables, wording
from subnet_ft.evidence.report.axes import css_class
from subnet_ft.evidence.report.row_plots import Mark, Row, rows_plot
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.section import Figure, Key, Section
from subnet_ft.evidence.report.wording import cost_of, duration, label, size


def cost(report: Report) -> Section | None:
    """Memory and time."""
    figures = []
    if report.costs:
        figures.append(
            Figure(
                "cost-way",
                "What does the subnetwork cost, its mask included?",
                wording.cost_sentence(report) or "",
                partial(_peaks_plot, report) if any(cost.peak_bytes for cost in report.costs) else None,
                f"Bars: largest memory of each run in training{_measure(report)}. Rings: of the whole way to it the "
                "first time, the run included that its mask was made from.",
                table=tables.costs_table(report),
                is_table_open=True,
            )
        )
    if any(not tables.is_peak(key) for sizes in report.memory.values() for key in sizes):
        own, full = cost_of(report, report.subnet), cost_of(report, report.full)
        lasting = "; ".join(
            f"{label(report, entry.run)} {size(entry.persistent_bytes)}"
            + (f", {entry.bytes_per_weight:.2f} bytes per weight" if entry.bytes_per_weight is not None else "")
            for entry in (full, own)
            if entry is not None and entry.persistent_bytes is not None
        )
        figures.append(
            Figure(
                "cost-memory",
                "What lives in memory from step to step?",
                f"{lasting[:1].upper()}{lasting[1:]}." if lasting else "",
                partial(plots.memory_plot, report),
                "By component, counted from the tensors. Activations and logits come on top.",
                keys=_keys(plots.stack_parts(report.memory, report)),
                table=tables.memory_table(report),
            )
        )
    if report.seconds:
        own = cost_of(report, report.subnet)
        known = own is not None and own.train_seconds is not None
        figures.append(
            Figure(
                "cost-time",
                "How long did every run take?",
                f"The subnetwork trained for {duration(own.train_seconds)}." if own is not None and known else "",
                partial(plots.time_plot, report),
                "Wall-clock time by stage."
                + (
                    " Under the subnetwork, what it took the first time with the run that its mask was made from."
                    if wording.whole_time(report)
                    else ""
                )
                + _partial(report),
                keys=_keys(plots.time_parts(report)),
                table=tables.time_table(report),
            )
        )
    said = wording.delta_sentence(report)
    return Section("cost", "Cost", figures, [] if said is None else [said]) if figures else None


def _keys(parts: list[str]) -> list[Key]:
    return [Key(f"part-{index % 6 + 1}", tables.words(part)) for index, part in enumerate(parts)]


def _measure(report: Report) -> str:
    """Say what the drawn peaks are of: one measure only, as the two do not compare."""
    of = {"device": ", as torch allocated it on the device", "process": ", resident in the process", None: ""}
    others = any(entry.peak_of not in (None, _drawn(report)) for entry in report.costs)
    return of[_drawn(report)] + (" (those of another measure are in the table only)" if others else "")


def _drawn(report: Report) -> PeakOf | None:
    return next((entry.peak_of for entry in report.costs if entry.peak_of), None)


def _partial(report: Report) -> str:
    """Name the runs that were resumed: what is shown of them is not the whole time."""
    cut = [
        label(report, entry.run)
        for entry in report.costs
        if entry.train_seconds is None and "train" in report.seconds.get(entry.run, {})
    ]
    return f" Interrupted and resumed, so shown from there on only: {', '.join(cut)}." if cut else ""


def _peaks_plot(report: Report, width: float) -> str | None:
    rows = []
    for entry in report.costs:
        if entry.peak_bytes is None or entry.peak_of != _drawn(report):
            continue
        style, name = css_class(report, entry.run), label(report, entry.run)
        first = entry.first_peak_bytes
        marks = [] if first is None else [Mark(first, style, f"{name}, the first time: {size(first)}")]
        tip = f"{name}: {size(entry.peak_bytes)}"
        rows.append(Row(name, style, entry.peak_bytes, size(entry.peak_bytes), is_bar=True, marks=marks, tip=tip))
    return rows_plot(rows, width, title="Peak memory of every run, alone and the first time", write=_tick, within=(0,))


def _tick(value: float) -> str:
    return size(value) if value else "0"
