"""Weights of which every process saved its part: torch's distributed checkpoints in safetensors, read as a whole."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from subnet_ft.checkpoints.listing import listing
from subnet_ft.checkpoints.shards import (
    INDEX_FILE,
    SINGLE_FILE,
    ShardReader,
    StoredTensor,
    TensorSpec,
    map_stored,
    stored_tensors,
    stream,
    weight_spec,
)
from subnet_ft.errors import CheckpointError

SHARDED = "sharded"
"""Folder, in a checkpoint, of the parts; torch's `HuggingFaceStorageWriter` gives it the same name."""
PARTS = "shard-*.safetensors"
"""The names that torch gives to the files of parts: `shard-00001-model-00001-of-00001.safetensors`."""

_SHARDING, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
_MOST_DIMENSIONS = 8
_AGAIN = "Save or copy the checkpoint again."

Offsets = tuple[int, ...]


@dataclass
class TensorInParts:
    """A tensor and where its parts lie.

    Args:
        parts: What is stored of it, each with the index of its first element, a number per dimension.
        where: The folder, for messages.
    """

    where: Path
    parts: list[tuple[Offsets, StoredTensor]] = field(default_factory=list)

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole, which is that of the box around all parts."""
        ends = ([start + size for start, size in zip(at, part.shape, strict=True)] for at, part in self.parts)
        return tuple(max(sizes) for sizes in zip(*ends, strict=True))

    @property
    def dtype_name(self) -> str:
        """Dtype of the whole, as safetensors calls it."""
        return self.parts[0][1].dtype_name

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype, or refuse a dtype in which no weight can be trained."""
        return weight_spec(key, self.where, self.shape, self.dtype_name)

    @property
    def is_in_rows(self) -> bool:
        """Whether the parts, one after another, are the whole: they divide its first dimension, or nothing."""
        return all(not any(at[1:]) and part.shape[1:] == self.shape[1:] for at, part in self.parts)

    def check(self, key: str) -> None:
        """Put the parts in order, and check that they make the whole without gap and overlap; sizes are not trusted."""
        self.parts.sort(key=lambda part: part[0])
        names = {part.dtype_name for _, part in self.parts}
        dimensions = {len(part.shape) for _, part in self.parts}
        if len(names) > 1 or len(dimensions) > 1 or max(dimensions) > _MOST_DIMENSIONS:
            raise CheckpointError(
                f"The parts of `{key}` in `{self.where}` do not belong together: they have {listing(sorted(names))} of "
                f"{', '.join(map(str, sorted(dimensions)))} dimensions. {_AGAIN}"
            )
        # The sum of the parts' indicator functions is that of the whole, exactly where their corners, signed, add up.
        corners: Counter[Offsets] = Counter()
        for at, part in self.parts:
            _add_corners(corners, at, part.shape, 1)
        _add_corners(corners, (0,) * len(self.shape), self.shape, -1)
        wrong = sorted(corner for corner, count in corners.items() if count)
        if wrong:
            held = sum(math.prod(part.shape) for _, part in self.parts)
            raise CheckpointError(
                f"The {len(self.parts)} parts of `{key}` in `{self.where}` leave a gap or overlap at {list(wrong[0])}: "
                f"they hold {held:,} of {math.prod(self.shape):,} weights, shape {self.shape}. The file of a process "
                "is missing, or was left by an earlier save by more of them. Copy the checkpoint again, or save it "
                "again into an empty folder."
            )


class PartsReader(Mapping[str, TensorInParts]):
    """The tensors of a model that a distributed checkpoint holds in parts; opening reads headers only.

    Torch saves the state of a run under one name per kind, such as `model.` and `optimizer.`. What is read here is what
    stands under the name that has the model's parameters.

    Args:
        folder: Holds the files of parts.
        parameters: The names of the model's parameters.

    Raises:
        CheckpointError: Files are damaged, their parts do not make whole tensors, or two models are in them.
    """

    def __init__(self, folder: Path, parameters: Set[str]) -> None:
        found: dict[str, TensorInParts] = {}
        for file in sorted(folder.glob(PARTS)):
            stored, about = stored_tensors(file)
            offsets = _offsets(file, about, stored)
            for key, part in stored.items():
                found.setdefault(key, TensorInParts(folder)).parts.append((offsets[key], part))
        prefix = _prefix(found, parameters, folder)
        self._stored = {key.removeprefix(prefix): held for key, held in found.items() if key.startswith(prefix)}
        for key, held in self._stored.items():
            held.check(key)

    def __getitem__(self, key: str) -> TensorInParts:
        return self._stored[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor as a whole: mapped from its file where it is one part, else put together in memory."""
        held = self._stored[key]
        spec = held.spec(key)
        if len(held.parts) == 1:
            return map_stored(held.parts[0][1], spec)
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        for at, part in held.parts:
            place = tuple(slice(start, start + size) for start, size in zip(at, part.shape, strict=True))
            whole[place] = map_stored(part, TensorSpec(part.shape, spec.dtype))
        return whole

    def pieces(self, key: str, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        """Read one tensor piece by piece, as `ShardReader.pieces` does; parts of columns are put together first."""
        held = self._stored[key]
        spec = held.spec(key)
        if held.is_in_rows:
            yield from stream([part for _, part in held.parts], spec.dtype, buffer, key)
            return
        size = buffer.numel() // spec.dtype.itemsize
        flat = self.read(key).view(-1)
        for start in range(0, flat.numel(), size):
            piece = buffer.view(spec.dtype)[: min(size, flat.numel() - start)]
            yield piece.copy_(flat[start : start + size])


def parts_folder(folder: Path) -> Path | None:
    """Return where a checkpoint's weights lie in parts, it or a folder in it; `None` where it has whole files."""
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return None
    return next((place for place in (folder, folder / SHARDED) if any(place.glob(PARTS))), None)


def _add_corners(corners: Counter[Offsets], at: Offsets, shape: tuple[int, ...], sign: int) -> None:
    """Add the corners of a box, those with an odd number of far ends negative; an empty box adds nothing."""
    ends = [((start, 1), (start + size, -1)) for start, size in zip(at, shape, strict=True)]
    for corner in itertools.product(*ends):
        corners[tuple(place for place, _ in corner)] += sign * math.prod(factor for _, factor in corner)


def _offsets(file: Path, about: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> dict[str, Offsets]:
    """Return the index of the first element of every tensor in a file, by what its header says."""
    try:
        described: Any = json.loads(about[_SHARDING])
        found = {key: tuple(described[key][_OFFSETS]) for key in stored}
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"`{file}` does not say which parts of its tensors it holds: its header's `{_SHARDING}` cannot be read "
            f"({type(error).__name__}: {error}). {_AGAIN}"
        ) from error
    for key, at in found.items():
        sound = all(type(start) is int and 0 <= start < 2**63 for start in at)  # a bool is no offset
        if not sound or len(at) != len(stored[key].shape):
            raise CheckpointError(
                f"`{file}` holds a part of `{key}`, shape {stored[key].shape}, at the impossible place "
                f"{list(at)[:_MOST_DIMENSIONS]}. {_AGAIN}"
            )
    return found


def _prefix(keys: Iterable[str], parameters: Set[str], folder: Path) -> str:
    """Return what stands before the names of the model's parameters: the text with which most of them are there."""
    count: Counter[str] = Counter()
    for key in keys:
        starts = itertools.accumulate((len(word) + 1 for word in key.split(".")), initial=0)
        count.update(key[:start] for start in starts if key[start:] in parameters)
    most = max(count.values(), default=0)
    best = sorted(prefix for prefix, found in count.items() if found == most)
    if len(best) > 1:
        raise CheckpointError(
            f"`{folder}` holds {len(best)} models of this kind, under {listing(best)}. Save the one that you mean "
            "alone: `save_pretrained`, or a state dict of this model."
        )
    return best[0] if best else ""


Reader: TypeAlias = ShardReader | PartsReader
"""The tensors of a model on disk, by their names there."""
