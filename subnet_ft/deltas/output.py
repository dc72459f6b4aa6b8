"""Weight files with the layout of others: the header of the base's file, and tensors written where they lie there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from subnet_ft.checkpoints import Checkpoint
from subnet_ft.checkpoints.shards import StoredTensor
from subnet_ft.errors import DeltaError

_BLOCK = 1 << 22
_WAITING = 8
"""Pieces in memory that wait for the disk, while the next ones are read and checked."""
_SYNC = 1 << 26
"""Bytes after which the disk is set to work, so that little is left to wait for at the end."""


class ShardWriter:
    """Writes weight files whose headers, names and places are those of a checkpoint's files.

    Invariant: a file differs from the base's only in the tensors that `write` receives; those of a file that are no
    parameter (buffers) are copied.

    Args:
        checkpoint: The base.
        files: Which of its files to write, each with where to.
    """

    def __init__(self, checkpoint: Checkpoint, files: dict[Path, Path]) -> None:
        self._files = files
        self._stored = checkpoint.stored
        self._ignored = [key for key in checkpoint.ignored if key not in checkpoint.copies]

    def __enter__(self) -> ShardWriter:
        self._descriptors: dict[Path, int] = {}
        self._pending: deque[Future[None]] = deque()
        with contextlib.ExitStack() as stack:
            for base, target in self._files.items():
                descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                stack.callback(os.close, descriptor)
                self._descriptors[base] = descriptor
                size = base.stat().st_size
                _copy_range(base, descriptor, 0, min((s.offset for s in self._of(base)), default=size))
                os.truncate(descriptor, size)
            for key in self._ignored:
                stored = self._stored[key]
                if stored.file in self._descriptors:
                    _copy_range(stored.file, self._descriptors[stored.file], stored.offset, self._end(stored))
            self._thread = stack.enter_context(ThreadPoolExecutor(1))  # leaving waits for it
            self._syncing = stack.enter_context(ThreadPoolExecutor(1))
            self._synced: Future[None] | None = None
            self._written = 0
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if error is None:
                self._wait(0)
                if self._synced is not None:
                    self._synced.result()
                for descriptor in self._descriptors.values():
                    os.fsync(descriptor)

    def write(self, key: str, offset: int, data: torch.Tensor) -> None:
        """Write part of a tensor, if its file is one of those to write.

        Args:
            key: Name of the tensor on disk.
            offset: Byte in the tensor.
            data: (B,) uint8.
        """
        stored = self._stored[key]
        descriptor = self._descriptors.get(stored.file)
        if descriptor is not None:
            self._wait(_WAITING - 1)
            block: Any = data.numpy().copy().data
            self._pending.append(self._thread.submit(_write_all, descriptor, block, stored.offset + offset))
            self._written += len(block)
            if self._written >= _SYNC and (self._synced is None or self._synced.done()):
                self._sync(descriptor)

    def _sync(self, descriptor: int) -> None:
        """Bring a file to the disk beside what goes on. The system reports an error only once, so each is looked at."""
        if self._synced is not None:
            self._synced.result()
        self._synced = self._syncing.submit(os.fsync, descriptor)
        self._written = 0

    def _wait(self, most: int) -> None:
        """Wait until at most so many pieces are still to be written; an error of writing is raised here."""
        while len(self._pending) > most:
            self._pending.popleft().result()

    def _of(self, file: Path) -> list[StoredTensor]:
        return [stored for stored in self._stored.values() if stored.file == file]

    def _end(self, stored: StoredTensor) -> int:
        """Return the byte behind a tensor: where the next one of its file starts."""
        later = [other.offset for other in self._of(stored.file) if other.offset > stored.offset]
        return min(later, default=stored.file.stat().st_size)


def check_room(folder: Path, files: Iterable[Path]) -> None:
    """Check that copies of some files fit on the disk of a folder.

    Raises:
        DeltaError: They do not; the message has both sizes.
    """
    needed = sum(file.stat().st_size for file in files)
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DeltaError(f"`{folder}` needs {needed:,} bytes of new weight files, and its disk has {free:,} free.")


def _copy_range(source: Path, target: int, start: int, end: int) -> None:
    for offset, block in _blocks(source, start, end):
        _write_all(target, memoryview(block), offset)


def _blocks(source: Path, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    with source.open("rb", buffering=0) as file:
        file.seek(start)
        while start < end:
            block = file.read(min(_BLOCK, end - start))
            if not block:
                raise DeltaError(f"`{source}` became shorter while it was read. Try again.")
            yield start, block
            start += len(block)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
