"""Trainer checkpoints that are whole or not there: written aside, listed, and moved into place in one step."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STAGING = ".unfinished"
"""Folder beside the checkpoints where one is written; what a killed run leaves there is never loaded."""

MANIFEST = "subnet_ft.json"
"""File of a checkpoint that is written last: its other files with their digests, and what it belongs to."""

FORMAT = 1
"""Version of the manifest."""


def staging_folder(run_folder: Path) -> Path:
    """Return the folder in which the checkpoints of a run are written before they are whole."""
    return run_folder / STAGING


def clear_staging(run_folder: Path) -> None:
    """Remove what a killed run left unfinished."""
    shutil.rmtree(staging_folder(run_folder), ignore_errors=True)


def publish(written: Path, checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Move a checkpoint into place, so that at no moment a part of it can be taken for the whole.

    Args:
        written: Its folder in the staging folder, complete but for the manifest.
        checkpoint: Where it goes; an older checkpoint of that step is replaced.
        facts: What the manifest says besides the list of files.
    """
    files = {str(path.relative_to(written)): digest for path, digest in digests(written).items()}
    manifest = written / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, **facts, "files": files}, indent=1) + "\n")
    # Names must not reach the disk before the bytes behind them.
    for path in [*written.rglob("*"), written]:
        _sync(path)
    discarded = _set_aside(checkpoint) if checkpoint.exists() else None
    try:
        os.replace(written, checkpoint)
    except BaseException:
        if discarded is not None:
            os.replace(discarded, checkpoint)
        raise
    _sync(checkpoint.parent)
    if discarded is not None:
        shutil.rmtree(discarded)


def digests(folder: Path) -> dict[Path, str]:
    """Return the SHA-256 of every file in a folder but the manifest, several at a time."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(_sha256, paths), strict=True))


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint in one step, so that no half of it is ever found."""
    shutil.rmtree(_set_aside(checkpoint))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _set_aside(checkpoint: Path) -> Path:
    discarded = staging_folder(checkpoint.parent) / f"discarded-{checkpoint.name}"
    shutil.rmtree(discarded, ignore_errors=True)
    discarded.parent.mkdir(exist_ok=True)
    os.replace(checkpoint, discarded)
    return discarded


def rotate(
    run_folder: Path, *, newest: Path, limit: int | None, best: str | None, max_bytes: int | None = None
) -> None:
    """Remove the oldest checkpoints beyond `save_total_limit` and `save_total_bytes`; the newest and the best one stay.

    Args:
        run_folder: Where the checkpoints are.
        newest: The one just written, which is known to be whole. The times of the others only say which is older:
            whoever changes a file in a checkpoint makes it look newer.
        limit: How many may stay; `None` and numbers below 1: all.
        best: Path of the best one so far.
        max_bytes: How many bytes all that stay may take.
    """
    from transformers.trainer_utils import sort_checkpoints

    limit = None if limit is None or limit <= 0 else limit
    if limit is None and max_bytes is None:
        return
    checkpoints = [Path(path) for path in sort_checkpoints(str(run_folder), use_mtime=True)]
    kept = {path.resolve() for path in (newest, *([Path(best)] if best is not None else []))}
    sizes = {path: size_of(path) for path in checkpoints} if max_bytes is not None else {}
    count, total = len(checkpoints), sum(sizes.values())
    for checkpoint in [path for path in checkpoints if path.resolve() not in kept]:
        too_many = limit is not None and count > max(limit, len(kept))
        if not too_many and (max_bytes is None or total <= max_bytes):
            break
        remove(checkpoint)
        count, total = count - 1, total - sizes.get(checkpoint, 0)


def size_of(folder: Path) -> int:
    """Return how many bytes the files of a folder have."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
