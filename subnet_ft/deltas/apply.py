"""`apply_delta`: a base and a delta make a checkpoint folder, or change one in place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.checkpoints.settled import JOURNAL
from subnet_ft.checkpoints.shards import INDEX_FILE, SINGLE_FILE
from subnet_ft.deltas.checks import AnyDelta, open_deltas
from subnet_ft.deltas.in_place import apply_in_place
from subnet_ft.deltas.output import ShardWriter, check_room
from subnet_ft.deltas.patching import Patch
from subnet_ft.deltas.writing import sync_folder
from subnet_ft.errors import DeltaError
from subnet_ft.masks import SubnetMask

# What goes with the weights: config, tokenizer, templates, licences. Not a trainer's state, nor other deltas.
_SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_THE_MODEL = (
    *("trainer_state.json", "subnet_ft.json"),  # of a trainer's checkpoint; the latter has digests of its weights
    *("stage.json", "started.json", "log.json", "dynamics.json"),
    *(INDEX_FILE, JOURNAL),
)


def apply_delta(
    base: str | Path | Checkpoint,
    delta: str | Path | AnyDelta | Sequence[str | Path | AnyDelta],
    output: str | Path | None = None,
    *,
    in_place: bool = False,
    mask: SubnetMask | str | Path | None = None,
) -> Path:
    """Apply a delta, or a chain of them, to a base; the result is an ordinary checkpoint, bit for bit the tuned one.

    Weights are streamed. Weight files keep the names and the layout of the base's, and every weight is checked by
    fingerprint before and after. Config and tokenizer are those of the base.

    Args:
        base: A folder, a Hub id, a GGUF or an open `Checkpoint`; for `in_place`, a folder.
        delta: A delta, its file, `hub:OWNER/NAME[@REVISION]`, or several of which each belongs to the result of the one
            before.
        output: The new folder; it appears whole or not at all.
        in_place: Change the base's folder instead. What is replaced is kept there for `revert_delta`. A killed call is
            finished by the same call, or undone by `revert_delta`.
        mask: For delta files that refer to one.

    Returns:
        The folder.

    Raises:
        CheckpointError: The base cannot be found or read.
        DeltaFileError: A delta file breaks its format.
        DeltaMismatchError: The base is another one, or the deltas make no chain. Nothing was written.
        DeltaError: Neither or both of `output` and `in_place`, the folder is not empty, or it cannot be written.
    """
    chosen = SubnetMask.load(mask) if isinstance(mask, (str, Path)) else mask
    deltas = open_deltas(delta, chosen)
    if in_place == (output is not None):
        raise DeltaError("Say where the result goes: either name an output folder, or ask for it in place.")
    if output is None:
        folder = base.folder if isinstance(base, Checkpoint) else Path(base).expanduser()
        return apply_in_place(folder, deltas)
    target = Path(output)
    check_new(target)
    checkpoint = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    patch = Patch(checkpoint, deltas)
    files = sorted({stored.file for stored in checkpoint.stored.values()})
    with _writing(target):
        check_room(target, files)
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as staging:
            content = Path(staging) / "content"  # the folder around it is private; this one has ordinary permissions
            content.mkdir()
            with ShardWriter(checkpoint, {file: content / file.name for file in files}) as writer:
                patch.run(writer.write)
            for file in files:
                shutil.copymode(file, content / file.name)
            for name in side_files(checkpoint.folder):
                shutil.copy(checkpoint.folder / name, content / name)
            if not (checkpoint.folder / SINGLE_FILE).is_file():
                shutil.copy(checkpoint.folder / INDEX_FILE, content / INDEX_FILE)
            sync_folder(content)
            check_new(target)  # another process may have made it in the meantime
            os.rename(content, target)  # an empty folder is replaced
        sync_folder(target.absolute().parent)
    return target


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"`{error.filename}`: " if error.filename else ""
        raise DeltaError(
            f"`{target}` cannot be made: {where}{error.strerror or error}. Free space or get access, or name another "
            "folder."
        ) from error


def check_new(folder: Path) -> None:
    """Check that a folder is new or empty.

    Raises:
        DeltaError: Something is there.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if os.path.lexists(folder):
        raise DeltaError(f"`{folder}` is already there. Name a new folder, or remove it first.")


def side_files(folder: Path) -> list[str]:
    """Return the names of what belongs to a checkpoint beside its weights."""
    found = {path.name for pattern in _SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(found - set(_NOT_THE_MODEL))
