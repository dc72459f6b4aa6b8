"""Whether a folder's weights are all of one model, or a delta that was applied in place stopped half-way."""

from __future__ import annotations

import shlex
from pathlib import Path

from subnet_ft.errors import CheckpointError

JOURNAL = "subnet-ft-journal.json"
"""Where a change in place writes down what it is in the middle of."""
REPLACING = "replacing"
"""What it says while some weight files are old and others new."""


def check_settled(folder: Path) -> None:
    """Check that no weight file of a folder waits to be replaced.

    Raises:
        CheckpointError: A change in place was interrupted there.
    """
    try:
        text = (folder / JOURNAL).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, IsADirectoryError):
        return
    if f'"{REPLACING}"' in text:
        raise CheckpointError(
            f"A delta was being applied to `{folder}` in place, or taken back, when that was interrupted: some of its "
            "weights are old, others new. Finish it by the same command, or undo it with "
            f"`{shlex.join(['subnet-ft', 'delta', 'revert', str(folder)])}`."
        )
