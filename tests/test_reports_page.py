"""docs/reports.md against what a report with all evidence shows and what a recipe can ask for."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from report_evidence import full_report

from subnet_ft.evidence.cost import mask_origin
from subnet_ft.evidence.report.sections import sections_of
from subnet_ft.recipe import Recipe

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "reports.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table after a line that starts with `heading`."""
    lines = PAGE[PAGE.index(heading) :].splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("|---"))
    table = []
    for line in lines[first + 1 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_page_lists_every_section_and_question_in_order() -> None:
    expected = []
    for section in sections_of(full_report()):
        for number, figure in enumerate(section.figures):
            question = "What is left of *another task*?" if "retention-task" in figure.id else figure.question
            if [section.title, question] not in [row[:2] for row in expected]:
                expected.append(["" if number else section.title, question])
    # The two tasks of the report are one row.
    expected = [row for index, row in enumerate(expected) if index == 0 or row[1] != expected[index - 1][1]]
    assert [row[:2] for row in rows("| section ")] == expected


def test_page_names_fields_of_recipes() -> None:
    def has(kind: Any, path: list[str]) -> bool:
        kind = next((option for option in (kind, *get_args(kind)) if is_dataclass(option)), None)
        if not path:
            return True
        if kind is None or path[0] not in {field.name for field in fields(kind)}:
            return False
        return has(get_type_hints(kind)[path[0]], path[1:])

    named = {name for row in rows("| section ") for name in re.findall(r"`([a-z_.]+)`", row[2])} - {"subnet", "all"}
    assert named
    assert [name for name in named if not has(Recipe, name.split("."))] == []


def test_page_says_what_masks_need() -> None:
    said = {"full": "the full run", "probe": "a probe run", "nothing": "nothing but the base"}
    for kinds, needs in rows("| source of the mask "):
        for kind in re.findall(r"`(\w+)`", kinds):
            origin = mask_origin({"kind": kind}, recipe_kind=kind, has_tuned=kind == "extract")
            assert needs.startswith(said.get(origin, "a run that the report knows nothing of")), kind
