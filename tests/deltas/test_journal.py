"""The journal of a change in place: whole or not at all, and refused when it says anything else."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from delta_checkpoints import unchanged

from subnet_ft.checkpoints.settled import JOURNAL
from subnet_ft.deltas.journal import Journal, read_journal, staged, undo_files, write_journal
from subnet_ft.errors import DeltaError

SUFFIX = ".delta.safetensors"
UNFINISHED = Journal(
    "apply", "replacing", "0" * 64, f".undo-001{SUFFIX}", ["model.safetensors", "wéight 2.safetensors"]
)


def test_a_journal_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_journal(tmp_path) is None
    for journal in (UNFINISHED, replace(UNFINISHED, action="revert", phase="preparing", files=[])):
        write_journal(tmp_path, journal)
        assert read_journal(tmp_path) == journal
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL]


def test_a_journal_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_journal(tmp_path, UNFINISHED)

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as context:
            context.setattr(os, name, refuse)
            with pytest.raises(OSError, match="No space left"):
                write_journal(tmp_path, replace(UNFINISHED, phase="preparing"))
        assert read_journal(tmp_path) == UNFINISHED


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "delete"},
        {"action": ["apply"]},
        {"phase": "x"},
        {"result": 3},
        {"undo": "../x"},
        {"undo": f".undo-1{SUFFIX}"},
        {"undo": f"../.undo-001{SUFFIX}"},
        {"undo": None},
        {"more": 1},
        *(
            {"files": files}
            for files in (
                ["../x"],
                [".."],
                ["."],
                [""],
                ["/etc/passwd"],
                ["a\0b"],
                ["\ud800"],
                [3],
                "model.safetensors",
                {},
            )
        ),
    ],
)
def test_a_journal_that_says_anything_else_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text(json.dumps(asdict(UNFINISHED) | fields))
    with unchanged(tmp_path), pytest.raises(DeltaError, match=r"journal\.json` cannot be read"):
        read_journal(tmp_path)


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", "3", '{"action": "apply"}', "[" * 100_000, "\ud800"])
def test_a_journal_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(text.encode(errors="surrogatepass"))
    with unchanged(tmp_path), pytest.raises(DeltaError, match=r"journal\.json` cannot be read"):
        read_journal(tmp_path)


def test_undo_files_are_those_of_ours_by_number(tmp_path: Path) -> None:
    names = [f".undo-{number}{SUFFIX}" for number in ("001", "002", "1000")]
    for name in (*names, f"undo-003{SUFFIX}", f".undo-04{SUFFIX}", f".undo-005{SUFFIX}.x", f"..undo-006{SUFFIX}"):
        (tmp_path / name).touch()
    assert undo_files(tmp_path) == {number: tmp_path / name for number, name in zip((1, 2, 1000), names, strict=True)}


def test_staged_lies_beside_the_file(tmp_path: Path) -> None:
    assert staged(tmp_path / "model.safetensors") == tmp_path / "model.safetensors.subnet-ft-new"
