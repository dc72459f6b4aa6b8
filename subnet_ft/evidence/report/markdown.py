"""The report as Markdown, its verdict in the first line."""

from __future__ import annotations

import re

from subnet_ft.evidence.report import tables, wording
from subnet_ft.evidence.report.schema import Report
from subnet_ft.evidence.report.sections import sections_of


def render_markdown(report: Report) -> str:
    """Return the report as GitHub-flavoured Markdown."""
    broken = wording.is_mask_broken(report)
    blocks = [f"# Verdict: {wording.headline(report).lower()}"]
    blocks += [f"**{escape(wording.off_mask_sentence(report))}**" if broken else wording.claim(report)]
    blocks.append(report.verdict_reason)
    points = [None if broken else wording.off_mask_sentence(report)]
    points += [*wording.control_sentences(report), wording.cost_sentence(report)]
    blocks.append("\n".join(f"- {escape(point)}" for point in points if point))
    if report.title:
        blocks.append(f"{escape(report.title)}. Written by subnet-ft {report.version}.")

    for section in sections_of(report):
        blocks.append(f"## {section.title}")
        for entry in section.figures:
            blocks.append(f"**{escape(entry.question)}** {escape(entry.answer)}".rstrip())
            if entry.table is not None:
                blocks.append(table(entry.table))
        blocks += [escape(note) for note in section.notes]

    if report.samples:
        blocks += [f"## {len(report.samples)} {report.judged_on}", wording.samples_sentence(report)]
        for sample in report.samples:
            blocks.append(_fenced(sample.prompt))
            lines = [f"- reference: {code(sample.reference)}"] if sample.reference else []
            for name in (report.base, report.full, report.subnet):
                if (answer := sample.answers.get(name)) is not None:
                    mark = "correct" if answer.correct else "wrong"
                    lines.append(f"- {wording.label(report, name)}, {mark}: {code(answer.completion)}")
            blocks.append("\n".join(lines))

    blocks += ["## What was not measured", "\n".join(f"- {escape(gap)}" for gap in report.not_measured)]
    blocks += ["## Conditions", "\n".join(f"- {name}: {code(value)}" for name, value in wording.conditions(report))]
    return "\n\n".join(blocks) + "\n"


def table(content: tables.Table) -> str:
    """Lay out a table."""
    rows = [content.header, ["---", *["---:"] * (len(content.header) - 1)], *content.rows]
    return "\n".join("| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows)


def escape(text: str) -> str:
    """Keep a text from being read as markup."""
    return re.sub(r"([|<>*`])", r"\\\1", text.replace("\n", " "))


def _fenced(text: str) -> str:
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}text\n{text}\n{fence}"


def code(text: str) -> str:
    """Quote one line of code, whatever backticks it holds; line breaks show as a sign."""
    line = text.replace("\r", "").replace("\n", " \u23ce ")
    fence = "`" * (_longest_ticks(line) + 1)
    return f"{fence} {line} {fence}" if line.strip() else "(empty)"


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
