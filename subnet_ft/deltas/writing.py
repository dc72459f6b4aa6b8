"""Delta files, written tensor by tensor, whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from subnet_ft.deltas.compression import check_zstd, compress
from subnet_ft.deltas.delta import Delta, TensorDelta
from subnet_ft.deltas.file import check_bits
from subnet_ft.deltas.header import (
    BITMAP,
    BITS,
    BY_MASK,
    STORED_AS,
    SUFFIX,
    VALUES,
    Header,
    TensorEntry,
    parse_header,
    write_header,
)
from subnet_ft.errors import DeltaError, DeltaFileError, DeltaMismatchError
from subnet_ft.masks import ModelRecord, SubnetMask

_BLOCK = 1 << 22


def save_delta(delta: Delta, path: str | Path, *, mask: SubnetMask | None = None, zstd: bool = False) -> Path:
    """Write a delta that is in memory; the file appears whole or not at all.

    Args:
        delta: What to write.
        path: `NAME.delta.safetensors`.
        mask: Write values only, and refer to this mask for the positions, which must be the delta's.
        zstd: Compress.

    Raises:
        DeltaMismatchError: `mask` has other positions.
        DeltaFileError: The file cannot be written.
        MissingDependencyError: zstandard is not installed.
    """
    if mask is not None and mask != delta.mask:
        raise DeltaMismatchError(
            f"The delta changes {delta.num_values:,} weights and the mask has {mask.num_trainable:,}, or others: a "
            "file without positions needs a mask of exactly its positions."
        )
    with DeltaWriter(path, delta.base, delta.source, mask=mask, zstd=zstd) as writer:
        for name, entry in delta.entries.items():
            writer.add(name, entry, delta.tensors[name])
    return writer.path


class DeltaWriter:
    """Writes a delta file tensor by tensor; on leaving the `with` block it appears whole, after an error not at all.

    Memory does not grow with the file: what is added waits beside it, by width, so that every tensor is aligned.

    Args:
        path: Where to.
        base: Name and revision of the base; dtypes and fingerprints come with the tensors.
        source: Where the delta came from.
        mask: Refer to this mask instead of writing bits.
        zstd: Compress.

    Raises:
        DeltaError: `source` is no JSON.
        DeltaFileError: `path` cannot be written, or a reader would refuse what was added; nothing is left then.
    """

    def __init__(
        self,
        path: str | Path,
        base: ModelRecord,
        source: dict[str, Any],
        *,
        mask: SubnetMask | None = None,
        zstd: bool = False,
    ) -> None:
        self.path = Path(path)
        if zstd:
            check_zstd("to compress a delta")
        self._with_bits = mask is None
        positions = BITMAP if mask is None else BY_MASK + mask.fingerprint
        try:
            json.dumps(source, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise DeltaError(f"The `source` of a delta is written as JSON, and this is none: {error}.") from error
        self._header = Header({}, base.name, base.revision, dict(source), positions, "zstd" if zstd else "raw")
        self._stored: dict[int, dict[str, tuple[str, int, int]]] = {4: {}, 2: {}, 1: {}}
        self.sha256 = ""
        self.nbytes = 0
        check_writable(self.path)

    def __enter__(self) -> DeltaWriter:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(dir=self.path.parent, prefix=_waiting(self.path))
            self._waiting = {width: self._beside(str(width)).open("wb") for width in self._stored}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for file in self._waiting.values():
                file.close()
            if error is None:
                with writing(self.path):
                    self._finish()
        finally:
            self._folder.cleanup()

    def add(self, name: str, entry: TensorEntry, tensor: TensorDelta) -> None:
        """Add one parameter; every parameter of the model is added once, in its order."""
        assert name not in self._header.entries
        self._header.entries[name] = entry
        if not entry.count:
            return
        check_bits(self.path, name, entry, tensor.bits)
        if self._with_bits:
            self._put(BITS + name, "U8", tensor.bits)
        self._put(VALUES + name, STORED_AS[entry.dtype], tensor.values)

    def _put(self, key: str, dtype: str, values: torch.Tensor) -> None:
        # A view of one element counts as contiguous with any stride, but only stride 1 can be viewed as bytes.
        whole = values.contiguous().as_strided((values.numel(),), (1,))
        data: Any = whole.view(torch.uint8).numpy().data
        width, length = values.element_size(), values.numel()
        with writing(self.path):
            if self._header.encoding == "zstd":
                frame = compress(data)
                dtype, width, length = "U8", 1, len(frame)
                self._waiting[width].write(frame)
            else:
                self._waiting[width].write(data)
        self._stored[width][key] = (dtype, length, length * width)

    def _finish(self) -> None:
        stored = {key: value for group in self._stored.values() for key, value in group.items()}
        start, digits_at = write_header(self._header, stored)
        # A file that its own reader refuses would be found out when the checkpoint is needed.
        parse_header(self.path, start[8:], len(start) + sum(nbytes for _, _, nbytes in stored.values()))
        digest = hashlib.sha256(start)
        whole = self._beside("whole")
        with whole.open("wb") as file:
            file.write(start)
            for width in self._stored:
                with self._beside(str(width)).open("rb") as waiting:
                    while block := waiting.read(_BLOCK):
                        digest.update(block)
                        file.write(block)
                os.unlink(self._beside(str(width)))
            self.nbytes = file.tell()
            self.sha256 = digest.hexdigest()
            file.seek(digits_at)
            file.write(self.sha256.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(whole, self.path)
        sync_folder(self.path.parent)

    def _beside(self, name: str) -> Path:
        return Path(self._folder.name) / name


def check_writable(path: Path) -> None:
    """Check that a delta can be written to `path`, before the work of making it; nothing is created.

    Raises:
        DeltaFileError: `path` is a folder, lacks the suffix, or its parent is no folder that can be made.
    """
    if not path.name.endswith(SUFFIX):
        raise DeltaFileError(f"`{path}` does not end in `{SUFFIX}`. Name it `{path.name.partition('.')[0]}{SUFFIX}`.")
    with writing(path):
        if path.is_dir():
            raise DeltaFileError(f"`{path}` is a folder. Name a file in it, such as `{path / ('run' + SUFFIX)}`.")
        ancestor = path.absolute().parent
        while not ancestor.exists():
            ancestor = ancestor.parent
        if not ancestor.is_dir():
            raise DeltaFileError(f"`{path}` cannot be written: `{ancestor}` is a file. Choose another folder.")


def remove_unfinished(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; nobody may be writing it."""
    for folder in path.parent.glob(f"{glob.escape(_waiting(path))}*"):
        shutil.rmtree(folder)


def _waiting(path: Path) -> str:
    """Return how the names of folders begin in which parts of a delta wait."""
    return f".{path.name}."


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system raises while `path` is written into a DeltaFileError that names it."""
    try:
        yield
    except OSError as error:
        raise DeltaFileError(
            f"`{path}` cannot be written: {error.strerror or error}. Choose a path in a folder that you may write to "
            "and that has room."
        ) from error
