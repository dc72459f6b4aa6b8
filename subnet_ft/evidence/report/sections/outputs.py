"""What models say: agreement with the full run on held-out prompts, and what they keep of the base elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from subnet_ft.evidence.agreement import agreement_differences
from subnet_ft.evidence.output_distance import KlDifference
from subnet_ft.evidence.report.axes import css_class, percent_tick
from subnet_ft.evidence.report.row_plots import Row, rows_plot
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.section import Figure, Section
from subnet_ft.evidence.report.tables import Table
from subnet_ft.evidence.report.wording import MISSING, label, percent, points, the
from subnet_ft.evidence.retention import text_differences

_LEAD = "subnetwork\u2019s minus it"


def agreement(report: Report) -> Section | None:
    """Outputs of every model against the full run's."""
    found = {name: report.agreement[name] for name in report.models if name in report.agreement}
    if not found:
        return None
    first = next(iter(found.values()))
    compared = [name for name, entry in found.items() if entry.kl_by_prompt]
    leads = _leads(agreement_differences(found, _pairs(report, compared)))
    rows = [
        [
            label(report, name),
            f"{entry.kl:.4f} {_ends(entry.kl_low, entry.kl_high)}",
            leads.get(name, MISSING),
            percent(entry.same_token),
            f"{percent(entry.same_completion)} [{entry.same_low * 100:.1f}, {entry.same_high * 100:.1f}]",
            MISSING
            if entry.same_answer is None or entry.same_answer_low is None or entry.same_answer_high is None
            else f"{percent(entry.same_answer)} "
            f"[{entry.same_answer_low * 100:.1f}, {entry.same_answer_high * 100:.1f}]",
        ]
        for name, entry in found.items()
    ]
    table = Table(["", "KL per token, nats", _LEAD, "same likeliest token", "same completion", "same answer"], rows)
    shown = [name for name in (report.subnet, *report.controls[:1], report.base) if name in found]
    level = f"{first.confidence * 100:g} %"
    figures = [
        Figure(
            "agreement-distribution",
            "How far are the outputs from the full run\u2019s?",
            _beside(
                "KL from the full run: ",
                [f"{found[name].kl:.4f} nats per token for {the(report, name)}" for name in shown],
            ),
            partial(_kl_plot, report),
            f"Mean KL of each model from the full run over {first.num_tokens:,} tokens of the full run\u2019s greedy "
            f"completions to {first.num_prompts:,} held-out prompts{_bootstrap(first.kl_low, level, 'prompts')}. 0 is "
            "the full run.",
            table=table,
        ),
        Figure(
            "agreement-completions",
            "How often is the greedy answer the full run\u2019s, word for word?",
            _beside(
                "The full run\u2019s own answer, word for word: ",
                [f"{percent(found[name].same_completion)} for {the(report, name)}" for name in shown],
            ),
            partial(_same_plot, report),
            f"Share of {first.num_prompts:,} prompts, with Wilson\u2019s {level} interval.",
        ),
    ]
    return Section("agreement", "Agreement of outputs", figures)


def _kl_plot(report: Report, width: float) -> str | None:
    rows = []
    for name in report.models:
        if (entry := report.agreement.get(name)) is not None:
            tip = f"{label(report, name)}: {entry.kl:.4f} nats {_ends(entry.kl_low, entry.kl_high)}"
            style, text = css_class(report, name), f"{entry.kl:.4f}"
            rows.append(Row(label(report, name), style, entry.kl, text, entry.kl_low, entry.kl_high, tip=tip))
    return rows_plot(rows, width, title="KL from the full run, in nats per token", write="{:.3g}".format, within=(0,))


def _same_plot(report: Report, width: float) -> str | None:
    rows = []
    for name in report.models:
        if (entry := report.agreement.get(name)) is not None:
            low, high, text = entry.same_low, entry.same_high, percent(entry.same_completion)
            tip = f"{label(report, name)}: {text}, {low * 100:.1f} to {high * 100:.1f} %"
            rows.append(
                Row(label(report, name), css_class(report, name), entry.same_completion, text, low, high, tip=tip)
            )
    title = "Share of greedy completions equal to the full run's"
    return rows_plot(rows, width, title=title, write=percent_tick, within=(0, 1), limits=(0, 1))


def retention(report: Report) -> Section | None:
    """What every model keeps of the base, task by task and on neutral text."""
    found = {name: report.retention[name] for name in report.models if name in report.retention}
    if not found:
        return None
    tasks = list(dict.fromkeys(task for entry in found.values() for task in entry.tasks))
    leads = _leads(text_differences(found, _pairs(report, [name for name in found if found[name].kl_by_paragraph])))
    rows = []
    for name, entry in found.items():
        kl = MISSING if entry.kl_to_base is None else f"{entry.kl_to_base:.4f} {_ends(entry.kl_low, entry.kl_high)}"
        if name == report.base:
            kl = "0"
        cells = [
            f"{percent(kept.accuracy)} [{kept.low * 100:.1f}, {kept.high * 100:.1f}]"
            if (kept := entry.tasks.get(task)) is not None
            else MISSING
            for task in tasks
        ]
        rows.append([label(report, name), *cells, kl, leads.get(name, MISSING)])
    table = Table(["", *tasks, "KL to the base, nats per token", _LEAD], rows)
    level = f"{next(iter(found.values())).confidence * 100:g} %"
    figures = [
        Figure(
            f"retention-task-{number}",
            f"What is left of {task}?",
            _kept(report, task),
            partial(_task_plot, report, task),
            f"Accuracy on a task that was not trained, with Wilson\u2019s {level} interval; the line is the base "
            "model.",
            table=_differences(report, task),
        )
        for number, task in enumerate(tasks, 1)
    ]
    moved = {name: entry for name, entry in found.items() if entry.kl_to_base is not None}
    if moved:
        shown = [
            name for name in (report.full, report.subnet, *report.controls[:1], *report.baselines) if name in moved
        ]
        figures.append(
            Figure(
                "retention-text",
                "How far did each run move on neutral text?",
                _beside(
                    "KL from the base: ",
                    [f"{moved[name].kl_to_base:.4f} nats per token for {the(report, name)}" for name in shown],
                ),
                partial(_moved_plot, report),
                f"Mean KL from the base to each run over {next(iter(moved.values())).num_tokens:,} tokens that have "
                f"nothing to do with the task{_bootstrap(next(iter(moved.values())).kl_low, level, 'paragraphs')}. 0 "
                "is the base.",
                table=table,
            )
        )
    return Section("retention", "Retention", figures)


def _pairs(report: Report, names: Sequence[str]) -> list[tuple[str, str]]:
    return [(report.subnet, name) for name in names if name != report.subnet and report.subnet in names]


def _leads(gaps: Sequence[KlDifference]) -> dict[str, str]:
    """Write the subnetwork's KL minus that of every other model."""
    return {gap.second: f"{gap.difference:+.4f} {_ends(gap.low, gap.high, '+')}" for gap in gaps}


def _ends(low: float | None, high: float | None, sign: str = "") -> str:
    return "[no interval]" if low is None or high is None else f"[{low:{sign}.4f}, {high:{sign}.4f}]"


def _bootstrap(low: float | None, level: str, over: str) -> str:
    """Say what the interval is, or why there is none."""
    if low is None:
        return f"; there is no interval over {over}, as there was only one"
    return f", with the {level} interval of a bootstrap over {over}"


def _kept(report: Report, task: str) -> str:
    sentences = []
    for second in (report.base, report.full):
        for gap in report.retention_differences:
            if (gap.task, gap.first, gap.second) == (task, report.subnet, second):
                interval = f"{points(gap.difference)} points [{points(gap.low)}, {points(gap.high)}]"
                sentences.append(f"{interval} against {the(report, second)}")
    return f"On {task} the subnetwork is at {' and '.join(sentences)}." if sentences else ""


def _differences(report: Report, task: str) -> Table | None:
    rows = [
        [
            f"{label(report, gap.first)} minus {label(report, gap.second)}",
            f"{points(gap.difference)} [{points(gap.low)}, {points(gap.high)}]",
        ]
        for gap in report.retention_differences
        if gap.task == task
    ]
    return Table(["", f"points [{report.confidence * 100:g} %]"], rows) if rows else None


def _task_plot(report: Report, task: str, width: float) -> str | None:
    rows, base = [], None
    for name in report.models:
        kept = report.retention[name].tasks.get(task) if name in report.retention else None
        if kept is not None:
            text = percent(kept.accuracy)
            tip = f"{label(report, name)}: {text}, {kept.low * 100:.1f} to {kept.high * 100:.1f} %"
            base = kept.accuracy if name == report.base else base
            style = css_class(report, name)
            rows.append(Row(label(report, name), style, kept.accuracy, text, kept.low, kept.high, tip=tip))
    title = f"Accuracy on {task}"
    return rows_plot(rows, width, title=title, write=percent_tick, limits=(0, 1), reference=base)


def _moved_plot(report: Report, width: float) -> str | None:
    rows = []
    for name in report.runs:
        entry = report.retention.get(name)
        if entry is not None and entry.kl_to_base is not None:
            tip = f"{label(report, name)}: {entry.kl_to_base:.4f} nats {_ends(entry.kl_low, entry.kl_high)}"
            style, text = css_class(report, name), f"{entry.kl_to_base:.4f}"
            rows.append(Row(label(report, name), style, entry.kl_to_base, text, entry.kl_low, entry.kl_high, tip=tip))
    return rows_plot(rows, width, title="KL from the base on neutral text", write="{:.3g}".format, within=(0,))


def _beside(start: str, parts: list[str]) -> str:
    return f"{start}{', '.join(parts)}." if parts else ""
