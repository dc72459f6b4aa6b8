"""Weights: how many are the full run's, how far the rest is, whether each moved alike, and what two full runs share."""

from __future__ import annotations

from functools import partial

from subnet_ft.evidence.report import plots, tables, wording
from subnet_ft.evidence.report.axes import css_class, percent_tick
from subnet_ft.evidence.report.row_plots import Mark, Row, rows_plot
from subnet_ft.evidence.report.scatter_plot import scatter_panel
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.section import Figure, Key, Panel, Section
from subnet_ft.evidence.report.tables import Table
from subnet_ft.evidence.report.wording import SECOND_FULL, label, percent, points, the

_MOVEMENT = (
    "Identity within a tolerance is |run \u2212 full| in fp32. A weight in a mask that did not change got no update "
    "large enough for its storage format, or one that cancelled, so a mask\u2019s size overstates what was trained. A "
    "distance of 0 is the full run, 1 is as far from it as the base model."
)


def weights(report: Report) -> Section | None:
    """Identity with the full run, and distance to it."""
    identity = wording.identity_sentence(report)
    if identity is None:
        return None
    figures = [
        Figure(
            "weights-identity",
            "How many weights ended with the full run\u2019s bits?",
            identity,
            partial(plots.identity_plot, report),
            "Bars: over the weights whose bits the full run changed. Rings: over all weights, where the base model "
            "itself comes far without any training.",
            table=tables.identity_table(report),
            is_table_open=True,
        )
    ]
    own = report.weights[report.subnet].relative_distance
    if own is not None:
        figures.append(
            Figure(
                "weights-distance",
                "How far from the full run did each run end?",
                f"The subnetwork ended at {own:.2f} of the base model\u2019s distance{_floor_distance(report)}.",
                partial(plots.distance_plot, report),
                "Distance of all weights to the full run\u2019s, over the base model\u2019s: 0 is the full run, the "
                "line at 1 is as far from it as the base.",
                table=tables.movement_table(report),
                is_table_open=True,
            )
        )
    return Section("weights", "Weights", figures, [_MOVEMENT])


def _floor_distance(report: Report) -> str:
    second = None if report.floor is None else report.floor.weights.relative_distance
    return "" if second is None else f"; a full run with another seed ended at {second:.2f}"


def scatter(report: Report) -> Section | None:
    """The change of every weight against the full run's change."""
    found = report.scatter
    if found is None:
        return None
    runs = [name for name in report.runs if name in found.runs]
    rows = []
    for name in runs:
        run = found.runs[name]
        rows.append(
            [
                label(report, name),
                f"{run.num_weights:,}",
                percent(run.moved_run / run.num_weights) if run.num_weights else wording.MISSING,
                percent(run.moved_full / run.num_weights) if run.num_weights else wording.MISSING,
                percent(run.same_direction),
                wording.MISSING if run.cosine is None else f"{run.cosine:.3f}",
                percent(run.outside / run.num_weights) if run.num_weights else wording.MISSING,
            ]
        )
    said = [
        f"{percent(found.runs[name].same_direction)} in {the(report, name)}"
        for name in runs
        if found.runs[name].same_direction is not None
    ]
    figure = Figure(
        "scatter-changes",
        "Did each weight move as in the full run?",
        f"Of the weights that both runs changed, the same way: {', '.join(said)}." if said else "",
        caption="The weights of each run\u2019s own mask by two changes from the base: the full run\u2019s to the "
        "right, "
        "the run\u2019s own upwards; each shade darker stands for a multiple of the weights. On the dotted diagonal a "
        "weight moved as in the full run, on the horizontal line it did not move. A lattice is the steps of the "
        "storage format. Chance gives 50 % the same way and a "
        "cosine of 0.",
        panels=[
            Panel(
                label(report, name),
                partial(
                    scatter_panel,
                    found,
                    found.runs[name],
                    f"Changes of {the(report, name)} against the full run's",
                    css_class(report, name),
                ),
            )
            for name in runs
        ],
        table=Table(
            ["", "weights in its mask", "it moved", "full run moved", "same way, of both", "cosine", "off the axes"],
            rows,
        ),
    )
    return Section("scatter", "Weight by weight", [figure])


def floor(report: Report) -> Section | None:
    """What two full runs have in common that differ in nothing but their seed."""
    found = report.floor
    if found is None:
        return None
    first, second = found.seeds
    inside = found.weights.in_mask_identical
    overlap = found.overlap.overall if found.overlap is not None else None
    said = [f"Two full runs with seeds {first} and {second}."]
    if inside is not None:
        ours = report.weights[report.subnet].in_mask_identical if report.subnet in report.weights else None
        beside = "" if ours is None else f"; of the subnetwork\u2019s weights {percent(ours['0'])} are"
        said.append(
            f"Of the weights that the full run changed, {percent(inside['0'])} of the second one\u2019s have its bits"
            f"{beside}."
        )
    if overlap is not None and overlap.o1 is not None:
        said.append(
            f"Their masks share {percent(overlap.o1)}, against {percent(overlap.uniform_o1)} of uniformly random "
            f"weights and {percent(overlap.magnitude_o1)} of random weights of the same magnitude."
        )
    rows = [["weights with the same bits, of those the full run changed", percent(inside["0"] if inside else None)]]
    distance = found.weights.relative_distance
    rows.append(["distance / base\u2019s", wording.MISSING if distance is None else f"{distance:.2f}"])
    if overlap is not None:
        rows += [
            ["shared part of the first mask (o1)", percent(overlap.o1)],
            ["its uniform null", percent(overlap.uniform_o1)],
            ["its magnitude-matched null", percent(overlap.magnitude_o1)],
        ]
    if (gap := found.accuracy) is not None:
        level = f"{gap.confidence * 100:g} %"
        rows.append(
            [
                f"accuracy, second minus first, points [{level}]",
                f"{points(gap.difference)} [{points(gap.low)}, {points(gap.high)}]",
            ]
        )
    figure = Figure(
        "floor-shared",
        "What do two full runs share that differ only in their seed?",
        " ".join(said),
        partial(_floor_plot, report),
        "Shares of what the first full run changed. Dots: measured; rings: what random masks would share, uniform "
        "(grey) and matched on magnitude (violet). No subnetwork can be asked to be closer to a full run than a second "
        "full run is.",
        keys=[
            Key("m-full", "two full runs"),
            Key("m-subnet", "subnetwork and full run"),
            Key("m-base", "uniform null"),
            Key("m-control-1", "magnitude-matched null"),
        ],
        mark="dot",
        table=Table(["", f"{SECOND_FULL}"], rows),
    )
    return Section("floor", "The floor", [figure])


def _floor_plot(report: Report, width: float) -> str | None:
    found = report.floor
    assert found is not None
    rows = []
    if found.overlap is not None and (share := found.overlap.overall.o1) is not None:
        nulls = (
            ("m-base", "uniform null", found.overlap.overall.uniform_o1),
            ("m-control-1", "magnitude-matched null", found.overlap.overall.magnitude_o1),
        )
        marks = [Mark(null, style, tip=f"{name}: {percent(null)}") for style, name, null in nulls if null is not None]
        tip = f"changed by both: {percent(share)}"
        rows.append(Row("changed by both", "m-full", share, percent(share), marks=marks, tip=tip))
    inside = found.weights.in_mask_identical
    if inside is not None:
        ours = report.weights[report.subnet].in_mask_identical if report.subnet in report.weights else None
        marks = (
            [] if ours is None else [Mark(ours["0"], "m-subnet", tip=f"subnetwork: {percent(ours['0'])}", shape="dot")]
        )
        tip = f"second full run: {percent(inside['0'])}"
        rows.append(Row("same bits", "m-full", inside["0"], percent(inside["0"]), marks=marks, tip=tip))
    title = "What two full runs with different seeds share"
    return rows_plot(rows, width, title=title, write=percent_tick, within=(0, 1), limits=(0, 1))
