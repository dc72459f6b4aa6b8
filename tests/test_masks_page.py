"""docs/masks.md has every kind and rule, and its commands are ones that the command line takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from subnet_ft.cli.making import KINDS, RULES
from subnet_ft.cli.parser import parse
from subnet_ft.masks import CONTROLS
from subnet_ft.recipe.mask_schema import SOURCE_KINDS

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "masks.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^subnet-ft (.*)$", PAGE, flags=re.MULTILINE)
KIND_ROWS = {
    kind: cells
    for cells in (line.strip("|").split("|") for line in PAGE.splitlines() if line.count("|") == 6)
    for kind in re.findall(r"`(\w+)`", cells[0])
}


def test_the_table_has_every_kind_and_says_where_recipes_take_it() -> None:
    assert set(KIND_ROWS) == {*KINDS, *SOURCE_KINDS} - {"file"}
    for kind, cells in KIND_ROWS.items():
        expected = [word for word, kinds in (("source", SOURCE_KINDS), ("control", CONTROLS)) if kind in kinds]
        assert cells[-1].strip() == ", ".join(expected), kind


def test_the_page_names_every_rule() -> None:
    assert [rule for rule in RULES if f"`{rule}`" not in PAGE] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_parses(command: str) -> None:
    options = parse(command.split())
    assert callable(options.command)


def test_the_page_shows_commands() -> None:
    assert len(COMMANDS) >= 8
