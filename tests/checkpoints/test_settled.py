"""Folders in which a delta was being applied when the process died."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from subnet_ft.checkpoints import open_checkpoint, resolve_checkpoint
from subnet_ft.checkpoints.settled import REPLACING, check_settled
from subnet_ft.deltas.journal import Journal, write_journal
from subnet_ft.errors import CheckpointError

UNFINISHED = Journal("apply", REPLACING, "", ".undo-001.delta.safetensors", [])


def test_check_settled_refuses_what_is_half_changed(tmp_path: Path) -> None:
    check_settled(tmp_path)
    write_journal(tmp_path, replace(UNFINISHED, phase="preparing"))
    check_settled(tmp_path)  # all weights are old
    for action in ("apply", "revert"):
        write_journal(tmp_path, replace(UNFINISHED, action=action))
        with pytest.raises(CheckpointError, match=r"some of its weights are old.*subnet-ft delta revert"):
            check_settled(tmp_path)
    (spaced := tmp_path / "a folder").mkdir()
    write_journal(spaced, UNFINISHED)
    with pytest.raises(CheckpointError, match=f"`subnet-ft delta revert '{spaced}'`"):
        check_settled(spaced)


@pytest.mark.parametrize("load", [open_checkpoint, resolve_checkpoint])
def test_nothing_is_loaded_from_a_folder_that_is_half_changed(load: object, tmp_path: Path) -> None:
    write_journal(tmp_path, UNFINISHED)
    with pytest.raises(CheckpointError, match="was interrupted"):
        load(tmp_path)  # type: ignore[operator]


def test_a_damaged_journal_keeps_nobody_from_reading(tmp_path: Path) -> None:
    (tmp_path / "subnet-ft-journal.json").write_bytes(b"\xff\xfe")
    check_settled(tmp_path)
