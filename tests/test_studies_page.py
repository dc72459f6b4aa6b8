"""docs/studies.md names studies, runs and commands that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from subnet_ft.cli import main
from subnet_ft.studies.names import QUESTIONS
from subnet_ft.studies.plans import plan_study

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "studies.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^subnet-ft (study .+?)(?:\s+#.*)?$", PAGE, flags=re.MULTILINE)


def test_page_gives_every_study_with_its_question() -> None:
    assert dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", PAGE, flags=re.MULTILINE)) == QUESTIONS


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_are_accepted(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(command), "--dry-run"]) == 0
    assert "cells" in capsys.readouterr().out


def test_runs_that_the_page_names_are_in_the_studies(tmp_path: Path) -> None:
    output = f"output={tmp_path}"
    overlap, causes = (plan_study(name, "tiny/grpo", [output]) for name in ("overlap", "causes"))
    part = PAGE.partition("**overlap.**")[2].partition("**causes.**")[0]
    assert set(re.findall(r"\(`(\w+)`\)", part)) <= {cell.name for cell in overlap.cells}
    table = PAGE.partition("**causes.**")[2].partition("**which_mask.**")[0]
    named = set(re.findall(r"`([a-z]+_[a-z_]+|float32)`", table))
    other_way = {"kl_off", "clipping_on"}
    assert named - other_way <= {cell.name for cell in causes.cells}
    groups = set(re.findall(r"^\| ([\w ]+) \| ", table, flags=re.MULTILINE)) - {"group"}
    assert groups == {cell.group for cell in causes.cells} - {"", "seed"}
