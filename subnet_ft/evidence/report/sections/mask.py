"""The mask: where its weights lie, how much the tolerance decides, and what it shares with others."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from subnet_ft.evidence.overlap import MaskOverlap
from subnet_ft.evidence.report import mask_plots, tables
from subnet_ft.evidence.report.overlap_plots import matrix_plot, others_plot
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.section import Figure, Key, Section
from subnet_ft.evidence.report.tables import Table, short_kind
from subnet_ft.evidence.report.wording import MISSING, label, percent, tolerance_text

# An excess over the null that is as good as none.
_LITTLE = 0.01
# A pair drawn beside its nulls takes a row; the table has all.
_MOST_PAIRS = 12


def subnetwork(report: Report) -> Section | None:
    """Density by layer and kind, and by tolerance."""
    density = report.density
    if density is None:
        return None
    layers = {layer: share for layer, share in density.by_layer.items() if layer != "other"}
    said = f"{percent(density.overall)} of all weights train"
    if layers:
        said += f"; in the layers from {percent(min(layers.values()))} to {percent(max(layers.values()))}"
    if density.by_kind:
        most, least = (choose(density.by_kind, key=density.by_kind.__getitem__) for choose in (max, min))
        said += (
            f". Densest are {short_kind(most)} ({percent(density.by_kind[most])}), sparsest {short_kind(least)} "
            f"({percent(density.by_kind[least])})"
        )
    figures = [
        Figure(
            "mask-density",
            "Where do the trained weights lie?",
            f"{said}.",
            partial(mask_plots.density_plot, report),
            "Share of each matrix that is trainable, layer by layer; below, what lies outside the layers.",
            table=tables.density_table(report),
        )
    ]
    if len(density.by_tolerance) > 1:
        ordered = sorted(density.by_tolerance.items(), key=lambda entry: float(entry[0]))
        (first, exact), (last, rest) = ordered[0], ordered[-1]
        figures.append(
            Figure(
                "mask-tolerance",
                "How much does the tolerance decide?",
                f"The same two checkpoints differ in {percent(exact)} of their weights at a tolerance of "
                f"{float(first):g} "
                f"and in {percent(rest)} at {float(last):g}.",
                partial(mask_plots.tolerance_plot, report),
                "Density, in per cent, when a change must exceed a tolerance. A single sparsity says little.",
                table=Table(
                    ["tolerance", "density"],
                    [[tolerance_text(key, "exact"), percent(share)] for key, share in ordered],
                ),
            )
        )
    return Section("subnetwork", "The subnetwork", figures)


def overlap(report: Report) -> Section | None:
    """What masks share, beside what random masks would."""
    named = [
        replace(pair, first=label(report, pair.first), second=label(report, pair.second)) for pair in report.overlaps
    ]
    if not named:
        return None
    has_magnitude = any(pair.overall.magnitude_o1 is not None for pair in named)
    # Another run's mask tells more than a control, which lies at its null by construction.
    runs = [pair for pair in named if "control" not in pair.first + pair.second]
    keys = [Key("m-subnet", "measured"), Key("m-base", "uniform null")]
    own = label(report, report.subnet)
    drawn = [pair for pair in named if own in (pair.first, pair.second)]
    figures = [
        Figure(
            "overlap-nulls",
            "Does the mask share more with others than random masks would?",
            " ".join(_said(pair) for pair in (runs or named)[:2]),
            partial(others_plot, drawn[:_MOST_PAIRS], own),
            "Share of the subnetwork\u2019s mask that lies in each other one. Rounding lets small weights change in "
            "every run, so only "
            "what exceeds the magnitude-matched null speaks of shared structure; the magnitude-matched control lies at "
            "it by construction.",
            keys=[*keys, Key("m-control-1", "magnitude-matched null")] if has_magnitude else keys,
            mark="dot",
            table=_pairs(named),
        )
    ]
    if len(named) > 1:
        null = "magnitude-matched" if has_magnitude else "uniform"
        figures.append(
            Figure(
                "overlap-matrix",
                "Which masks are alike?",
                _most_alike(named),
                partial(matrix_plot, named),
                "Per cent of the row\u2019s mask that lies in the column\u2019s; where there is room, below it what "
                "the "
                f"{null} null expects. Colour is the excess over it.",
            )
        )
    return Section("overlap", "Overlap", figures)


def _said(pair: MaskOverlap) -> str:
    found = pair.overall
    said = f"{percent(found.o1)} of the mask of the {pair.first} lies in that of the {pair.second}"
    said += f": a uniformly random mask would reach {percent(found.uniform_o1)}"
    if found.magnitude_o1 is not None:
        said += f", one matched on magnitude {percent(found.magnitude_o1)}"
    return f"{said}."


def _most_alike(pairs: list[MaskOverlap]) -> str:
    known = [(pair.overall.excess, pair) for pair in pairs if pair.overall.excess is not None]
    if not known:
        return "Without the base there is no magnitude-matched null, so likeness cannot be judged."
    excess, pair = max(known, key=lambda entry: entry[0])
    said = (
        "None: no two masks share more than masks matched on magnitude would."
        if excess < _LITTLE
        else f"The {pair.first} and the {pair.second} go furthest beyond the magnitude-matched null: "
        f"{percent(excess)} of the way from it to one mask inside the other."
    )
    excess, pair = min(known, key=lambda entry: entry[0])
    if excess > -_LITTLE:
        return said
    return f"{said} The {pair.first} and the {pair.second} share less than that null: an excess of {percent(excess)}."


def _pairs(pairs: list[MaskOverlap]) -> Table:
    rows = [
        [
            f"{pair.first}, {pair.second}",
            _both(pair.overall.o1, pair.overall.o2),
            _both(pair.overall.uniform_o1, pair.overall.uniform_o2),
            _both(pair.overall.magnitude_o1, pair.overall.magnitude_o2),
            percent(pair.overall.jaccard),
            percent(pair.overall.excess),
        ]
        for pair in pairs
    ]
    return Table(["", "o1 / o2 %", "uniform null", "magnitude null", "Jaccard", "excess"], rows)


def _both(first: float | None, second: float | None) -> str:
    return " / ".join(MISSING if share is None else f"{share * 100:.1f}" for share in (first, second))
