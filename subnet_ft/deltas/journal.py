"""What a folder is in the middle of: the journal of a change in place, and the files that lie beside the weights."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from subnet_ft.checkpoints.settled import JOURNAL
from subnet_ft.deltas.writing import sync_folder
from subnet_ft.errors import DeltaError

STAGED = ".subnet-ft-new"
"""What a new file has behind its name until it takes the place of the old one."""

# Hidden: generation engines load every other `*.safetensors` of a folder without an index.
_UNDO_NAME = re.compile(r"\.undo-([0-9]{3,9})\.delta\.safetensors")

Action = Literal["apply", "revert"]
Phase = Literal["preparing", "replacing"]


@dataclass(frozen=True)
class Journal:
    """What a folder is in the middle of.

    Args:
        action: What was asked for.
        phase: How far it is.
        result: Digest of the weights that it ends with.
        undo: The delta of what is replaced: made by `apply`, used up by `revert`.
        files: The weight files to replace.
    """

    action: Action
    phase: Phase
    result: str
    undo: str
    files: list[str]


def read_journal(folder: Path) -> Journal | None:
    """Return what a folder is in the middle of; `None` if nothing.

    Raises:
        DeltaError: The journal cannot be read, or names a file outside the folder.
    """
    path = folder / JOURNAL
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        journal = Journal(**fields)
        sound = journal.action in ("apply", "revert") and journal.phase in ("preparing", "replacing")
        sound = sound and _UNDO_NAME.fullmatch(journal.undo) is not None
        sound = sound and isinstance(journal.result, str) and isinstance(journal.files, list)
        if not sound or not all(map(_is_file_name, journal.files)):
            raise ValueError(f"it says {str(fields)[:200]}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DeltaError(
            f"`{path}` cannot be read: {error}. Remove it, and see with `subnet-ft delta verify` whether the "
            "weights are whole."
        ) from error
    return journal


def write_journal(folder: Path, journal: Journal) -> None:
    """Say what a folder is in the middle of; what it said before, or this, outlives a power cut."""
    path = folder / JOURNAL
    new = path.with_name(path.name + STAGED)
    with new.open("w", encoding="utf-8") as file:
        json.dump(asdict(journal), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync_folder(folder)


def undo_files(folder: Path) -> dict[int, Path]:
    """Return the deltas that undo what was applied in place, by their number; the highest comes first."""
    matches = {path: _UNDO_NAME.fullmatch(path.name) for path in folder.iterdir()}
    return {int(match[1]): path for path, match in matches.items() if match is not None}


def staged(file: Path) -> Path:
    """Return where the file waits that takes the place of another."""
    return file.with_name(file.name + STAGED)


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and Path(name).name == name
