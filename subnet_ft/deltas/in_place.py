"""Changing a checkpoint folder in place: killed at any moment, it can be finished or undone.

New weight files are written beside the old ones, together with a delta of what they replace. Only when all of them are
whole and checked does the journal say `replacing`, and each takes its place by one rename. So every weight file is the
old one or the new one at any moment, and the journal says how to go on:

    no journal               nothing is going on
    phase `preparing`        all weight files are old; what lies beside them is thrown away
    phase `replacing`        the remaining renames finish the job; all weights are checked before it counts as done
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.cache import cache_folder
from subnet_ft.deltas.checks import AnyDelta, base_digest, result_digest
from subnet_ft.deltas.file import DeltaFile
from subnet_ft.deltas.header import SUFFIX
from subnet_ft.deltas.output import ShardWriter, check_room
from subnet_ft.deltas.patching import Patch
from subnet_ft.deltas.verify import wrong_weights
from subnet_ft.deltas.writing import DeltaWriter, sync_folder
from subnet_ft.errors import DeltaError
from subnet_ft.masks import ModelRecord

JOURNAL = "subnet-ft-journal.json"
_UNDO_NAME = re.compile(r"\.undo-([0-9]{3,9})\.delta\.safetensors")
# Hidden: generation engines load every other `*.safetensors` of a folder without an index.
STAGED = ".subnet-ft-new"

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


def apply_in_place(folder: Path, deltas: Sequence[AnyDelta]) -> Path:
    """Change the weights of a folder and keep what is replaced; `apply_delta` says more."""
    result = result_digest(deltas[-1])
    _refuse_cache(folder)
    with _locked(folder):
        unfinished = read_journal(folder)
        if unfinished is not None and unfinished.phase == "replacing":
            if (unfinished.action, unfinished.result) != ("apply", result):
                raise DeltaError(
                    f"`{folder}` is in the middle of another `{unfinished.action}`, which was interrupted. Finish it "
                    "by the same command, or undo it with `subnet-ft delta revert`."
                )
            _resume(folder, unfinished, {name: entry.result for name, entry in deltas[-1].entries.items()})
            return folder
        _discard(folder, unfinished)
        number = max(undo_files(folder), default=0) + 1
        _change(folder, deltas, Journal("apply", "preparing", result, f".undo-{number:03d}{SUFFIX}", []))
    return folder


def revert_delta(folder: str | Path) -> Path:
    """Undo the last `apply_delta(..., in_place=True)` of a folder; afterwards every byte of its weights is as before.

    An interrupted `apply` is undone, too, and an interrupted `revert` finished.

    Raises:
        DeltaError: There is nothing to undo, or the weights have changed since.
        CheckpointError: The folder is no checkpoint.
    """
    folder = Path(folder).expanduser()
    with _locked(folder):
        unfinished = read_journal(folder)
        if unfinished is not None and unfinished.phase == "replacing":
            _resume(folder, unfinished, _expected(folder, unfinished))
            if unfinished.action == "revert":
                return folder
        else:
            _discard(folder, unfinished)
            if unfinished is not None and unfinished.action == "apply":
                return folder  # interrupted before it changed anything
        undo = undo_files(folder)
        if not undo:
            raise DeltaError(f"`{folder}` has no `.undo-001{SUFFIX}`: no delta was applied to it in place.")
        delta = DeltaFile(undo[max(undo)])
        _change(folder, [delta], Journal("revert", "preparing", result_digest(delta), delta.path.name, []))
    return folder


def check_settled(folder: Path) -> None:
    """Check that a folder's weights are all of one model: not some of them old and some new.

    Raises:
        DeltaError: A change in place was interrupted there.
    """
    journal = read_journal(folder)
    if journal is not None and journal.phase == "replacing":
        raise DeltaError(
            f"`{folder}` is in the middle of `{journal.action}`, which was interrupted: some of its weights are old, "
            f"others new. Finish it by the same command, or undo it with `subnet-ft delta revert {folder}`."
        )


def undo_files(folder: Path) -> dict[int, Path]:
    """Return the deltas that undo what was applied in place, by their number; the highest comes first."""
    matches = {path: _UNDO_NAME.fullmatch(path.name) for path in folder.iterdir()}
    return {int(match[1]): path for path, match in matches.items() if match is not None}


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
            f"`{path}` cannot be read: {error}. If the weights are whole (`subnet-ft delta verify`), remove it."
        ) from error
    return journal


def _change(folder: Path, deltas: Sequence[AnyDelta], journal: Journal) -> None:
    checkpoint = open_checkpoint(folder)
    patch = Patch(checkpoint, deltas)
    files = patch.changed_files()
    linked = next((file for file in files if file.is_symlink()), None)
    if linked is not None:
        raise DeltaError(
            f"`{linked}` is a link, as in the Hub's cache, and other folders may share its file. Apply the delta to a "
            "new folder (`-o`)."
        )
    check_room(folder, files)
    for file in files:
        _staged(file).unlink(missing_ok=True)  # without a journal, of a process whose journal somebody removed
    journal = Journal(journal.action, "preparing", journal.result, journal.undo, [file.name for file in files])
    try:
        _write_journal(folder, journal)
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(ShardWriter(checkpoint, {file: _staged(file) for file in files}))
            for file in files:
                shutil.copymode(file, _staged(file))
            replaced = None
            if journal.action == "apply":
                source = {"kind": "undo", "of": deltas[-1].base.name}
                undo = stack.enter_context(DeltaWriter(folder / journal.undo, ModelRecord(str(folder)), source))
                replaced = undo.add
            patch.run(writer.write, replaced)
        sync_folder(folder)
        replacing = Journal(journal.action, "replacing", journal.result, journal.undo, journal.files)
        _write_journal(folder, replacing)
    except BaseException:
        # Once the journal says `replacing`, new files may be all that the next call has: it finishes or undoes the job.
        if read_journal(folder) in (None, journal):
            _discard(folder, journal)
        raise
    _replace(folder, replacing)
    _finish(folder, replacing)


def _expected(folder: Path, journal: Journal) -> dict[str, str] | None:
    """Return the fingerprints that an unfinished job ends with; `None` once a `revert` has used up its delta."""
    path = folder / journal.undo
    if not path.exists():
        if journal.action == "revert":
            return None
        raise DeltaError(f"`{path}` is gone, so nothing can be undone. The same `apply` finishes the job.")
    undo = DeltaFile(path)
    digest = base_digest(undo) if journal.action == "apply" else result_digest(undo)
    if digest != journal.result:
        raise DeltaError(
            f"`{path}` does not belong to the `{journal.action}` that was interrupted in `{folder}`: its weights have "
            f"the digest {digest[:16]}, the journal expects {journal.result[:16]}. Put back the file that was there."
        )
    return {name: entry.base if journal.action == "apply" else entry.result for name, entry in undo.entries.items()}


def _resume(folder: Path, journal: Journal, expected: Mapping[str, str] | None) -> None:
    """Finish what a killed process began; what lay there since may be gone or changed, so all weights are checked."""
    _replace(folder, journal)
    wrong = wrong_weights(open_checkpoint(folder), expected) if expected is not None else []
    if wrong:
        raise DeltaError(
            f"`{folder}` was interrupted in the middle of `{journal.action}`, and {len(wrong)} tensors are not what "
            f"that leads to, such as `{wrong[0]}`: weight files, or the new ones beside them, were removed or changed "
            f"since. Get the checkpoint again, and remove `{folder / JOURNAL}`."
        )
    _finish(folder, journal)


def _replace(folder: Path, journal: Journal) -> None:
    for name in journal.files:
        staged = _staged(folder / name)
        if staged.exists():
            os.replace(staged, folder / name)
    sync_folder(folder)


def _finish(folder: Path, journal: Journal) -> None:
    if journal.action == "revert":
        (folder / journal.undo).unlink(missing_ok=True)
    (folder / JOURNAL).unlink()
    sync_folder(folder)


def _discard(folder: Path, journal: Journal | None) -> None:
    """Throw away what was prepared; no weight file was touched."""
    (folder / (JOURNAL + STAGED)).unlink(missing_ok=True)  # of a process that was killed before it began
    if journal is None:
        return
    for name in journal.files:
        _staged(folder / name).unlink(missing_ok=True)
    if journal.action == "apply":
        (folder / journal.undo).unlink(missing_ok=True)
        for unfinished in folder.glob(f".{journal.undo}.*"):
            shutil.rmtree(unfinished)
    (folder / JOURNAL).unlink(missing_ok=True)
    sync_folder(folder)


def _write_journal(folder: Path, journal: Journal) -> None:
    path = folder / JOURNAL
    new = path.with_name(path.name + STAGED)
    with new.open("w", encoding="utf-8") as file:
        json.dump(asdict(journal), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync_folder(folder)


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and Path(name).name == name


def _staged(file: Path) -> Path:
    return file.with_name(file.name + STAGED)


def _refuse_cache(folder: Path) -> None:
    from huggingface_hub import constants

    for owner, cache, names in (
        ("the Hub's client", Path(constants.HF_HUB_CACHE), "models--*"),
        ("subnet-ft", cache_folder(), "*"),
    ):
        inside = [place for place in (folder.resolve(), *folder.resolve().parents) if place.parent == cache.resolve()]
        if any(place.match(names) for place in inside):
            raise DeltaError(
                f"`{folder}` is in the cache of {owner}, where everybody finds the base. Apply the delta to a new "
                "folder (`-o`)."
            )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from changing a folder at the same time; the system drops the lock of a killed one."""
    if not folder.is_dir():
        raise DeltaError(f"`{folder}` is no folder. Only a checkpoint in a folder of yours can be changed in place.")
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _lock(folder, descriptor)
            yield
        finally:
            os.close(descriptor)
    except OSError as error:
        named = f"`{error.filename}`" if error.filename else "a file in it"
        raise DeltaError(
            f"`{folder}` cannot be changed in place: {named}: {error.strerror or error}. Its weight files are whole. "
            "Free space or get access and try again, or apply the delta to a new folder (`-o`)."
        ) from error


def _lock(folder: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DeltaError(f"Another process is changing `{folder}` right now. Wait until it has ended.") from error
    except OSError as error:  # NFS and some cluster file systems lock no folders
        raise DeltaError(
            f"`{folder}` cannot be locked ({error.strerror}), so another process could change it at the same time. "
            "Apply the delta to a new folder (`-o`), or on a local disk."
        ) from error
