"""Accuracy: of every model, against the full run, against the controls, and over several seeds."""

from __future__ import annotations

from functools import partial

from subnet_ft.evidence.report import plots, tables, wording
from subnet_ft.evidence.report.axes import css_class, points_tick
from subnet_ft.evidence.report.row_plots import Mark, Row, rows_plot
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.section import Figure, Section
from subnet_ft.evidence.report.tables import Table
from subnet_ft.evidence.report.wording import VERDICTS, label, percent, points, the, typographic
from subnet_ft.evidence.seeds import MixedDifference


def accuracy(report: Report) -> Section | None:
    """Every model's accuracy, and what the verdict rests on."""
    if not report.accuracy:
        return None
    margin, level = f"{report.margin * 100:g}", f"{report.confidence * 100:g} %"
    reached = ", ".join(
        f"{label(report, name)} {percent(report.accuracy[name].accuracy)}"
        for name in (report.base, report.full, report.subnet)
        if name in report.accuracy
    )
    figures = [
        Figure(
            "accuracy-models",
            "How often is each model right?",
            f"{reached[0].upper()}{reached[1:]}.",
            partial(plots.accuracy_plot, report),
            f"{wording.judged_sentence(report.judged_on, report.num_prompts)}, with each model\u2019s own Wilson "
            f"interval. The band is one margin, {margin} points, around the full run. In the table, * marks the base "
            f"model\u2019s difference at {level}, which decides if anything can be recovered.",
            table=tables.accuracy_table(report),
            is_table_open=True,
        ),
        Figure(
            "accuracy-differences",
            "Did the subnetwork reach the full run?",
            report.verdict_reason,
            partial(plots.difference_plot, report),
            f"Each run minus the full run, {report.judged_on[:-1]} by {report.judged_on[:-1]}, in points: the interval "
            "that the verdict looks at. A run recovers when its interval lies inside the band, or wholly right of "
            f"zero. The table has a bootstrap over {report.judged_on} and McNemar\u2019s test beside it; no verdict "
            "rests on these "
            "two.",
            table=tables.tests_table(report),
        ),
    ]
    if report.controls or report.baselines:
        figures.append(
            Figure(
                "accuracy-controls",
                "Would another mask of this size do as well?"
                if report.controls
                else "Is the subnetwork above other methods?",
                " ".join(wording.control_sentences(report)[:1]),
                partial(plots.lead_plot, report),
                f"Subnetwork minus each other run, in points, with the {level} interval; right of zero the subnetwork "
                "is better. A control trained as many weights of another choice and is judged by the same rule; the "
                "one that speaks most against the subnetwork comes first.",
                table=tables.controls_table(report),
                is_table_open=True,
            )
        )
    return Section("accuracy", "Accuracy", figures, [wording.rule_sentence(report)])


def seeds(report: Report) -> Section | None:
    """Every run that was repeated, over all its seeds."""
    if not report.seeds_summary:
        return None
    answers = [
        f"Over {len(entry.seeds)} seeds {the(report, entry.run)} is {_said(entry.minus_full)} from the full run "
        f"of the same seed: {VERDICTS[entry.verdict].lower()}. {entry.reason}"
        for entry in report.seeds_summary
    ]
    confidence = report.seeds_summary[0].minus_full.confidence
    rows = [
        [
            label(report, entry.run),
            *(points(entry.minus_full.by_seed[str(seed)]) for seed in entry.seeds),
            _interval(entry.minus_full),
            points(entry.minus_full.sd_between_seeds).removeprefix("+"),
            _interval(entry.full_minus_base),
            VERDICTS[entry.verdict].lower(),
        ]
        for entry in report.seeds_summary
    ]
    header = ["", *(f"seed {seed}" for seed in report.seeds_summary[0].seeds)]
    header += [f"mean [{confidence * 100:g} %]", "spread between seeds", "full run minus base", "verdict"]
    figure = Figure(
        "seeds-differences",
        "Does the verdict hold with other seeds?",
        " ".join(answers),
        partial(_seeds_plot, report),
        "Each run minus the full run of the same seed, in points. Small dots: one seed each. Large dot: their mean, "
        "with an interval that covers both the choice of seeds and that of prompts. The band is one margin.",
        table=Table(header, rows),
    )
    return Section("seeds", "Several seeds", [figure])


def _seeds_plot(report: Report, width: float) -> str | None:
    rows = []
    for entry in report.seeds_summary:
        style, found = css_class(report, entry.run), entry.minus_full
        marks = [
            Mark(value, style, tip=typographic(f"seed {seed}: {points(value)} points"), shape="small")
            for seed, value in found.by_seed.items()
        ]
        tip = typographic(f"{label(report, entry.run)}: {_interval(found)} points")
        text = typographic(points(found.mean))
        rows.append(Row(label(report, entry.run), style, found.mean, text, found.low, found.high, marks=marks, tip=tip))
    return rows_plot(
        rows,
        width,
        title="Difference to the full run over several seeds, in points",
        write=points_tick,
        band=(-report.margin, report.margin),
        reference=0.0,
    )


def _said(found: MixedDifference) -> str:
    return f"{points(found.mean)} points [{found.confidence * 100:g} %: {points(found.low)} to {points(found.high)}]"


def _interval(found: MixedDifference) -> str:
    return f"{points(found.mean)} [{points(found.low)}, {points(found.high)}]"
