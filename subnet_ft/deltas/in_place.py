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
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.checkpoints.cache import cache_folder
from subnet_ft.checkpoints.settled import JOURNAL
from subnet_ft.deltas.checks import AnyDelta, base_digest, result_digest
from subnet_ft.deltas.file import DeltaFile
from subnet_ft.deltas.header import SUFFIX
from subnet_ft.deltas.journal import STAGED, Journal, read_journal, staged, undo_files, write_journal
from subnet_ft.deltas.output import ShardWriter, check_room
from subnet_ft.deltas.patching import Patch
from subnet_ft.deltas.verify import wrong_weights
from subnet_ft.deltas.writing import DeltaWriter, remove_unfinished, sync_folder
from subnet_ft.errors import DeltaError
from subnet_ft.masks import ModelRecord


def apply_in_place(folder: Path, deltas: Sequence[AnyDelta]) -> Path:
    """Change the weights of a folder and keep what is replaced; `apply_delta` says more."""
    result = result_digest(deltas[-1])
    _refuse_cache(folder)
    with _locked(folder):
        unfinished = read_journal(folder)
        if unfinished is not None and unfinished.phase == "replacing":
            if (unfinished.action, unfinished.result) != ("apply", result):
                way = "undo it" if unfinished.action == "apply" else "finish it"
                raise DeltaError(
                    f"`{folder}` is in the middle of another `{unfinished.action}`, which was interrupted: {way} with "
                    "`subnet-ft delta revert`" + (", or finish it by the same command." if way == "undo it" else ".")
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
        staged(file).unlink(missing_ok=True)  # without a journal, of a process whose journal somebody removed
    journal = Journal(journal.action, "preparing", journal.result, journal.undo, [file.name for file in files])
    try:
        write_journal(folder, journal)
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(ShardWriter(checkpoint, {file: staged(file) for file in files}))
            for file in files:
                shutil.copymode(file, staged(file))
            replaced = None
            if journal.action == "apply":
                source = {"kind": "undo", "of": deltas[-1].base.name}
                undo = stack.enter_context(DeltaWriter(folder / journal.undo, ModelRecord(str(folder)), source))
                replaced = undo.add
            patch.run(writer.write, replaced)
        sync_folder(folder)
        replacing = Journal(journal.action, "replacing", journal.result, journal.undo, journal.files)
        write_journal(folder, replacing)
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
    wrong = wrong_weights(Checkpoint(str(folder), folder), expected) if expected is not None else []
    if wrong:
        raise DeltaError(
            f"`{folder}` was interrupted in the middle of `{journal.action}`, and {len(wrong)} tensors are not what "
            f"that leads to, such as `{wrong[0]}`: weight files, or the new ones beside them, were removed or changed "
            f"since. Get the checkpoint again, and remove `{folder / JOURNAL}`."
        )
    _finish(folder, journal)


def _replace(folder: Path, journal: Journal) -> None:
    for name in journal.files:
        new = staged(folder / name)
        if new.exists():
            os.replace(new, folder / name)
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
        staged(folder / name).unlink(missing_ok=True)
    if journal.action == "apply":
        (folder / journal.undo).unlink(missing_ok=True)
        remove_unfinished(folder / journal.undo)
    (folder / JOURNAL).unlink(missing_ok=True)
    sync_folder(folder)


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
