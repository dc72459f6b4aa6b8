"""Checkpoints made once and kept: what a GGUF file or a tiny model becomes."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return `$SUBNET_FT_CACHE`, else `$XDG_CACHE_HOME/subnet-ft`, else `~/.cache/subnet-ft`."""
    chosen = os.environ.get("SUBNET_FT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subnet-ft"


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the cached folder `name`, after filling it with `build` if it is not there yet.

    The folder appears whole or not at all: it is filled beside its place and renamed into it, so that an interrupted
    build leaves no half checkpoint and of two processes building at once the first wins.

    Args:
        name: Folder name inside the cache; it must change whenever the content would.
        build: Writes the content into the empty folder that it is given.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    logger.info("Writing `%s`", target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        content = staging / "content"  # mkdtemp's own folder is private; this one has ordinary permissions
        content.mkdir()
        build(content)
        try:
            content.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
