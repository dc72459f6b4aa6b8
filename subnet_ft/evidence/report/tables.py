"""The tables of a report, as text cells: Markdown, HTML and the terminal only lay them out."""

from __future__ import annotations

from dataclasses import dataclass

from subnet_ft.evidence.report.schema import Accuracy, Difference, Report
from subnet_ft.evidence.report.wording import (
    VERDICTS,
    duration,
    label,
    percent,
    points,
    size,
    tolerance_text,
)

_NONE = "\u2013"


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the row, the others are right-aligned."""

    header: list[str]
    rows: list[list[str]]


def accuracy_cell(entry: Accuracy | None) -> str:
    """Write an accuracy with its interval, in per cent; a dash where there is none."""
    if entry is None:
        return _NONE
    return f"{percent(entry.accuracy)} [{entry.ci_low * 100:.1f}, {entry.ci_high * 100:.1f}]"


def difference_cell(entry: Difference | None) -> str:
    """Write a difference with its interval, in points; a dash where there is none."""
    if entry is None:
        return _NONE
    return f"{points(entry.difference)} [{points(entry.low)}, {points(entry.high)}]"


def accuracy_table(report: Report) -> Table | None:
    """Accuracy of every model with its interval, and its paired difference to the full run."""
    if not report.accuracy:
        return None
    level, narrow = report.confidence, round(2 * report.confidence - 1, 12)
    rows = []
    for name in report.models:
        entry = report.accuracy.get(name)
        if entry is None:
            continue
        gap = report.difference(name, report.full, confidence=narrow)
        if name == report.base and (gain := report.difference(report.full, name)) is not None:
            # The base model is compared at full confidence: that is the test of whether there is a gain at all.
            against = f"{points(-gain.difference)} [{points(-gain.high)}, {points(-gain.low)}] *"
        else:
            against = f"{points(gap.difference)} [{points(gap.low)}, {points(gap.high)}]" if gap else _NONE
        rows.append(
            [
                label(report, name),
                f"{entry.correct:,} / {entry.num_prompts:,}",
                percent(entry.accuracy),
                f"{entry.ci_low * 100:.1f} to {entry.ci_high * 100:.1f}",
                against,
            ]
        )
    header = ["", "correct", "accuracy", f"{level * 100:g} % interval", f"minus full run, points [{narrow * 100:g} %]"]
    return Table(header, rows)


def tests_table(report: Report) -> Table | None:
    """The full run's gain, the run judged, and its lead over every other, each by three methods."""
    others = [name for name in report.runs if name not in (report.full, report.subnet)]
    pairs = [(report.full, report.base), (report.subnet, report.full), *((report.subnet, name) for name in others)]
    rows = []
    for first, second in pairs:
        gap = report.difference(first, second)
        if gap is None or gap.bootstrap_low is None or gap.bootstrap_high is None:
            continue
        rows.append(
            [
                f"{label(report, first)} minus {label(report, second)}",
                points(gap.difference),
                f"{points(gap.low)} to {points(gap.high)}",
                f"{points(gap.bootstrap_low)} to {points(gap.bootstrap_high)}",
                f"{gap.mcnemar_p:.2g}",
            ]
        )
    level = f"{report.confidence * 100:g} %"
    return Table(["", "points", f"Tango, {level}", f"bootstrap, {level}", "McNemar, mid-p"], rows) if rows else None


def controls_table(report: Report) -> Table | None:
    """The controls under the subnetwork's rule."""
    if not report.controls:
        return None
    rows = []
    for name in report.controls:
        lead = report.difference(report.subnet, name)
        above = report.above_control.get(name)
        rows.append(
            [
                label(report, name),
                VERDICTS[report.control_verdicts[name].name].lower(),
                f"{points(lead.difference)} [{points(lead.low)}, {points(lead.high)}]" if lead else _NONE,
                above.answer if above else "not assessed",
            ]
        )
    interval = f"subnetwork minus it, points [{report.confidence * 100:g} %]"
    return Table(["", "verdict, same rule", interval, "subnetwork above it"], rows)


def identity_table(report: Report) -> Table | None:
    """Shares of weights within a tolerance of the full run's, over those whose bits it changed and over all."""
    entry = next((report.weights[name] for name in report.runs if name in report.weights), None)
    if entry is None:
        return None
    tolerances = list(entry.identical)
    rows = []
    compared = [name for name in report.runs if name in report.weights and name != report.full]
    if entry.base_in_mask_identical:
        shares = entry.base_in_mask_identical
        rows.append(
            [
                f"{label(report, report.base)}, weights the full run changed",
                *(percent(shares[key]) for key in tolerances),
            ]
        )
        for name in compared:
            inside = report.weights[name].in_mask_identical or {}
            rows.append(
                [
                    f"{label(report, name)}, weights the full run changed",
                    *(percent(inside.get(key)) for key in tolerances),
                ]
            )
    rows.append(
        [f"{label(report, report.base)}, all weights", *(percent(entry.base_identical[key], 2) for key in tolerances)]
    )
    for name in compared:
        shares = report.weights[name].identical
        rows.append([f"{label(report, name)}, all weights", *(percent(shares[key], 2) for key in tolerances)])
    return Table(["within", *(tolerance_text(key, "same bits") for key in tolerances)], rows)


def movement_table(report: Report) -> Table | None:
    """What every run changed: inside its own mask, outside it, and how far it lies from the full run."""
    rows = []
    for name in report.runs:
        weights = report.weights.get(name)
        if weights is None or name == report.full:
            continue
        distance = weights.relative_distance
        rows.append(
            [
                label(report, name),
                percent(weights.mask_changed_share) if weights.mask_changed_share is not None else _NONE,
                f"{weights.off_mask_changed:,}" if weights.off_mask_changed is not None else _NONE,
                f"{distance:.2f}" if distance is not None else _NONE,
            ]
        )
    header = ["", "share of its mask that changed", "changed outside it", "distance to full / base's"]
    return Table(header, rows) if rows else None


def memory_table(report: Report) -> Table | None:
    """Bytes by component and run."""
    runs = [name for name in report.runs if name in report.memory]
    if not runs:
        return None
    components = list(dict.fromkeys(key for name in runs for key in report.memory[name] if not is_peak(key)))
    peaks = list(dict.fromkeys(key for name in runs for key in report.memory[name] if is_peak(key)))
    rows = [
        [
            label(report, name),
            *(size(report.memory[name][key]) if key in report.memory[name] else _NONE for key in components),
            size(sum(value for key, value in report.memory[name].items() if not is_peak(key))),
            *(size(report.memory[name][key]) if key in report.memory[name] else _NONE for key in peaks),
        ]
        for name in runs
    ]
    return Table(["", *map(words, components), "together", *map(words, peaks)], rows)


def time_table(report: Report) -> Table | None:
    """Time by stage and run."""
    entries = [(label(report, name), report.seconds[name]) for name in report.models if name in report.seconds]
    if not entries:
        return None
    stages = list(dict.fromkeys(stage for _, seconds in (*entries[1:], entries[0]) for stage in seconds))
    rows = [
        [
            name,
            *(duration(seconds[stage]) if stage in seconds else _NONE for stage in stages),
            duration(sum(seconds.values())),
        ]
        for name, seconds in entries
    ]
    return Table(["", *map(words, stages), "together"], rows)


def costs_table(report: Report) -> Table | None:
    """What every run costs the first time, with the run that its mask needs, and again under the same mask."""
    if not report.costs:
        return None
    is_mixed = len({cost.peak_of for cost in report.costs if cost.peak_of}) > 1
    rows = [
        [
            label(report, cost.run),
            "\u2013" if cost.needs is None else f"{cost.needs} run",
            duration(cost.first_seconds),
            duration(cost.train_seconds),
            *(
                _bytes(peak) + (f" of the {cost.peak_of}" if is_mixed and peak is not None else "")
                for peak in (cost.first_peak_bytes, cost.peak_bytes)
            ),
            _bytes(cost.persistent_bytes),
            _NONE if cost.bytes_per_weight is None else f"{cost.bytes_per_weight:.2f}",
        ]
        for cost in report.costs
    ]
    header = [
        "",
        "needs",
        "time, first",
        "time, again",
        "peak, first",
        "peak, again",
        "step to step",
        "bytes per weight",
    ]
    return Table(header, rows)


def _bytes(value: int | None) -> str:
    return _NONE if value is None else size(value)


def density_table(report: Report) -> Table | None:
    """Density by matrix kind."""
    if report.density is None:
        return None
    return Table(
        ["", "density"], [[short_kind(kind), percent(share)] for kind, share in report.density.by_kind.items()]
    )


def is_peak(component: str) -> bool:
    """Whether a memory entry is a total of the process instead of a component."""
    return component.startswith("peak")


def words(key: str) -> str:
    """Turn a key such as `optimizer_state` into words."""
    return key.replace("_", " ").replace("rss", "RSS")


def short_kind(kind: str) -> str:
    """Shorten a matrix kind for a label: `self_attn.q_proj.weight` becomes `q_proj`, its bias `q_proj bias`."""
    parts = [part for part in kind.split(".") if part not in ("weight", "model")]
    if not parts:
        return kind
    short = " ".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]
    short = short.replace("layernorm", "norm")
    return short if len(short) <= 21 else f"{short[:9]}\u2026{short[-11:]}"
