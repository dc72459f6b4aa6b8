"""The course of training: when the mask forms, what rounding keeps back, and what was logged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median

from subnet_ft.evidence.dynamics import Dynamics
from subnet_ft.evidence.report import curve_plots
from subnet_ft.evidence.report.axes import css_class, percent_tick
from subnet_ft.evidence.report.curve_plots import lines_plot
from subnet_ft.evidence.report.plots import stacked
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.section import Figure, Key, Section
from subnet_ft.evidence.report.tables import Table
from subnet_ft.evidence.report.wording import label, percent, the

# What a reader wants to see of a log: the first two that were logged.
_METRICS = {
    "reward": "Did every run earn the same reward?",
    "rewards/accuracies": "In what share of pairs is the chosen answer preferred?",
    "accuracy": "In what share of pairs does the chosen completion get more reward?",
    "loss": "Did the loss fall alike?",
}
_ROWS = 12


def dynamics(report: Report) -> Section | None:
    """Which weights had changed at which step."""
    runs = [name for name in report.runs if name in report.dynamics]
    if not runs:
        return None
    name = runs[0]
    found, run = report.dynamics[name], label(report, name)
    half = next((step for step, share in zip(found.steps, found.recall, strict=True) if (share or 0) >= 0.5), None)
    figures = [
        Figure(
            "dynamics-mask",
            "When does the mask form?",
            (f"Half of the {run}\u2019s final mask had changed by step {half} of {found.steps[-1]}. " if half else "")
            + _at_first(found, run),
            partial(_mask_plot, found),
            f"The {run}, by step, a snapshot every {found.every}: share of the final mask that has changed already, "
            "share of what has changed that the final mask has, too, and share of all weights that has changed.",
            keys=[
                Key("m-subnet", "recall of the final mask"),
                Key("m-full", "coverage by it"),
                Key("m-base", "changed so far, of all weights"),
            ],
            mark="stroke",
            table=_steps_table(found),
        ),
        Figure(
            "dynamics-fate",
            "How many weights change and come back?",
            " ".join(
                f"In {the(report, run)} {percent(report.dynamics[run].final)} differ at the end, and "
                f"{percent(report.dynamics[run].cancelled)} differed on the way and are the base\u2019s again."
                for run in runs[:2]
            ),
            partial(_fate_plot, report, runs),
            "Share of all weights that differed from the base in any snapshot; the rest never did.",
            keys=[Key("part-1", "differ at the end"), Key("part-2", "changed and came back")],
            table=Table(
                ["", "never", "came back", "final"],
                [
                    [label(report, run), percent(entry.never), percent(entry.cancelled), percent(entry.final)]
                    for run in runs
                    for entry in (report.dynamics[run],)
                ],
            ),
        ),
    ]
    with_masters, without = _known(found.lost_with_masters), _known(found.lost_without_masters)
    if with_masters or without:
        said = []
        if with_masters:
            said.append(f"{percent(median(with_masters))} of the attempted updates left the stored bits as they were")
        if without:
            said.append(f"without masters {percent(median(without))} would be lost for good")
        figures.append(
            Figure(
                "dynamics-rounding",
                "What does rounding keep from the weights?",
                f"In the {run}\u2019s median step {'; '.join(said)}.",
                partial(_rounding_plot, found),
                "Share of attempted updates that left a stored weight as it was, by step. A master keeps them for "
                "later "
                "steps; without one they are lost.",
                keys=[Key("m-full", "with masters"), Key("m-control-1", "without masters")],
                mark="stroke",
            )
        )
    return Section("dynamics", "Dynamics", figures)


def _at_first(found: Dynamics, run: str) -> str:
    """Say what the first snapshot saw; a share of nothing is no figure, though nothing is amiss."""
    recall, coverage, start = found.recall[0], found.coverage[0], f"the first snapshot, step {found.steps[0]}"
    stayed = None if coverage is None else f"{percent(coverage)} of what had changed then stayed"
    if recall is None:
        return f"At the end no weight of the {run} differs, so it has no final mask" + (
            f"; at {start}, some did." if stayed else "."
        )
    if stayed is None:
        return f"At {start}, nothing had changed yet."
    return f"After {start}, it was {percent(recall)}, and {stayed}."


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _by_step(found: Dynamics, values: Sequence[float | None]) -> list[tuple[float, float]]:
    return [(step, value) for step, value in zip(found.steps, values, strict=True) if value is not None]


def _mask_plot(found: Dynamics, width: float) -> str | None:
    lines = [
        ("m-subnet", _by_step(found, found.recall)),
        ("m-full", _by_step(found, found.coverage)),
        ("m-base", _by_step(found, found.density)),
    ]
    title = "Recall and coverage of the final mask by step"
    return lines_plot(lines, width, title=title, write=percent_tick, write_x="{:g}".format, has_dots=True)


def _rounding_plot(found: Dynamics, width: float) -> str | None:
    lines = [
        ("m-full", _by_step(found, found.lost_with_masters)),
        ("m-control-1", _by_step(found, found.lost_without_masters)),
    ]
    title = "Updates lost to rounding by step"
    return lines_plot(lines, width, title=title, write=percent_tick, write_x="{:g}".format, has_dots=True)


def _fate_plot(report: Report, runs: Sequence[str], width: float) -> str | None:
    stacks = {
        label(report, run): {"differ at the end": entry.final, "came back": entry.cancelled}
        for run in runs
        for entry in (report.dynamics[run],)
    }
    parts = ["differ at the end", "came back"]
    return stacked(stacks, parts, width, percent, "Share of weights that ever differed from the base")


def _steps_table(found: Dynamics) -> Table:
    every = max(1, -(-len(found.steps) // _ROWS))
    chosen = sorted({*range(0, len(found.steps), every), len(found.steps) - 1})
    rows = [
        [
            str(found.steps[index]),
            _share(found.recall[index]),
            _share(found.coverage[index]),
            _share(found.density[index]),
            _share(found.jaccard[index]),
        ]
        for index in chosen
    ]
    return Table(["step", "recall", "coverage", "changed so far", "Jaccard with the one before"], rows)


def _share(share: float | None) -> str:
    """Write a share; one of nothing is a dash."""
    return "\u2013" if share is None else percent(share)


def training(report: Report) -> Section | None:
    """What was logged, run beside run."""
    found = []
    for metric, question in _METRICS.items():
        draw = partial(curve_plots.curves_plot, report, metric)
        if draw(720.0) is None:
            continue
        window = curve_plots.smoothing(report, metric)
        last = {name: curve_plots.last_value(report, metric, name) for name in report.runs}
        said = ", ".join(f"{label(report, name)} {value:.3g}" for name, value in last.items() if value is not None)
        bold = f" Bold: mean over {window // 2 * 2 + 1} logged steps." if window > 1 else ""
        runs = [name for name, value in last.items() if value is not None]
        found.append(
            Figure(
                f"training-{metric.replace('/', '-')}",
                question,
                f"At the end: {said}.",
                draw,
                f"{metric[0].upper()}{metric[1:]} by step.{' Thin: as logged.' if bold else ''}{bold}",
                keys=[Key(css_class(report, name), label(report, name)) for name in runs],
                mark="stroke",
            )
        )
    # The loss of an online algorithm measures no progress: a reward says all.
    figures = found[:1] if found and found[0].id == "training-reward" else found[:2]
    return Section("training", "Training", figures) if figures else None
