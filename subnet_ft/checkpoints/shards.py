"""The safetensors files of a checkpoint folder, read tensor by tensor."""

from __future__ import annotations

import io
import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from subnet_ft.checkpoints.foreign import without_weights
from subnet_ft.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on disk, and what its file's header says about it."""

    file: Path
    offset: int  # of its first byte in the file
    shape: tuple[int, ...]
    dtype_name: str

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype, or refuse a dtype in which no weight can be trained."""
        return weight_spec(key, self.file, self.shape, self.dtype_name)


class ShardReader(Mapping[str, StoredTensor]):
    """The tensors of a folder's safetensors files by their names on disk; opening reads headers only.

    Invariant: what `read` returns is mapped from its file, each tensor by itself: its pages are file-backed, no whole
    shard is ever copied into memory, and a tensor that is dropped is no longer resident either.

    Args:
        folder: Holds `model.safetensors`, or `model.safetensors.index.json` and the shards that it names.

    Raises:
        CheckpointError: There are no such files, or they are damaged or incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self._stored: dict[str, StoredTensor] = {}
        for file in _weight_files(folder):
            stored, _ = stored_tensors(file)
            for key in stored:
                if key in self._stored:
                    raise CheckpointError(
                        f"`{key}` is in `{self._stored[key].file.name}` and in `{file.name}` of `{folder}`, so which "
                        "one counts is unclear. Remove the stale file or save the model again into an empty folder."
                    )
            self._stored |= stored
        _check_index(folder, self._stored)

    def __getitem__(self, key: str) -> StoredTensor:
        return self._stored[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def read(self, key: str) -> torch.Tensor:
        """Map one tensor from its file; writing to the result changes memory only, never the file."""
        stored = self._stored[key]
        return map_stored(stored, stored.spec(key))

    def pieces(self, key: str, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        """Read one tensor piece by piece through a buffer: for large files far faster than faulting in their pages.

        Args:
            key: Name of the tensor on disk.
            buffer: uint8, a multiple of 8 bytes. Every piece but the last fills it and overwrites the one before.

        Returns:
            Flat pieces, in C order.

        Raises:
            CheckpointError: The file has become shorter.
        """
        stored = self._stored[key]
        return stream([stored], stored.spec(key).dtype, buffer, key)


def weight_spec(key: str, where: Path, shape: tuple[int, ...], dtype_name: str) -> TensorSpec:
    """Return shape and dtype of a weight, or refuse a dtype in which none can be trained."""
    if dtype_name not in _DTYPES:
        raise CheckpointError(
            f"`{key}` in `{where}` is stored as {dtype_name}; weights must be BF16, F16 or F32. Dequantize the model "
            "(`model.dequantize()`) or cast it, save it with `save_pretrained`, and use that folder."
        )
    return TensorSpec(shape, _DTYPES[dtype_name])


def stored_tensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and the texts in its header.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    handle = _open(file)
    offsets = _offsets(file)
    stored = {}
    for key in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
        header = handle.get_slice(key)
        stored[key] = StoredTensor(file, offsets[key], tuple(header.get_shape()), header.get_dtype())
    return stored, dict(handle.metadata() or {})


def map_stored(stored: StoredTensor, spec: TensorSpec) -> torch.Tensor:
    """Map a tensor of that shape and dtype from its file; writing to the result changes memory only."""
    count = math.prod(spec.shape)
    if not count:
        return torch.empty(spec.shape, dtype=spec.dtype)
    before = stored.offset % mmap.ALLOCATIONGRANULARITY
    length = before + count * spec.dtype.itemsize
    with stored.file.open("rb") as file:
        pages = mmap.mmap(file.fileno(), length, offset=stored.offset - before, access=mmap.ACCESS_COPY)
    return torch.frombuffer(pages, dtype=spec.dtype, count=count, offset=before).view(spec.shape)


def stream(parts: Iterable[StoredTensor], dtype: torch.dtype, buffer: torch.Tensor, key: str) -> Iterator[torch.Tensor]:
    """Read stored tensors, one after another, as pieces of which all but the last fill the buffer.

    Args:
        parts: In the order of their bytes in the whole.
        dtype: Theirs.
        buffer: uint8, a multiple of 8 bytes; every piece overwrites the one before.
        key: What messages call the whole.

    Raises:
        CheckpointError: A file has become shorter.
    """
    filled = 0
    for part in parts:
        left = math.prod(part.shape) * dtype.itemsize
        with part.file.open("rb", buffering=0) as file:
            file.seek(part.offset)
            while left:
                room = buffer[filled : filled + left]
                _fill(file, memoryview(room.numpy().data), key)
                left -= room.numel()
                filled += room.numel()
                if filled == buffer.numel():
                    yield buffer.view(dtype)
                    filled = 0
    if filled:
        yield buffer[:filled].view(dtype)


def _fill(file: io.FileIO, target: memoryview, key: str) -> None:
    while target:
        count = file.readinto(target)  # may be less than was asked for
        if not count:
            raise CheckpointError(f"`{file.name!s}` ends within `{key}`: it changed while it was read. Try again.")
        target = target[count:]


def _open(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(
            f"`{file.parent}` needs the shard `{file.name}`, which is not there: the checkpoint is incomplete. Copy or "
            "download it again."
        )
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"`{file}` is not a readable safetensors file ({error}); it may be truncated. Copy or download it again."
        ) from error


def _offsets(file: Path) -> dict[str, int]:
    """Return where each tensor of a file, which safetensors has found sound, starts in it."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    return {key: 8 + size + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}


def _weight_files(folder: Path) -> list[Path]:
    # transformers prefers the single file, too, when both forms are present.
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return [folder / name for name in sorted(set(_weight_map(folder).values()))]
    raise CheckpointError(without_weights(folder))


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX_FILE
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"`{index}` is not a valid index of shards ({error!r}). Save the model again.") from error
    for name in sorted(names, key=str):
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise CheckpointError(f"`{index}` names the shard {name!r}, which is not a file name in that folder.")
    return dict(weight_map)


def _check_index(folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    if (folder / SINGLE_FILE).is_file():
        return
    absent = sorted(set(_weight_map(folder)) - set(stored))
    if absent:
        raise CheckpointError(
            f"The index of `{folder}` names {len(absent)} tensors that its shards do not hold, such as `{absent[0]}`. "
            "Copy or download the checkpoint again."
        )
