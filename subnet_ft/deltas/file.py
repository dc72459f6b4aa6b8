"""Delta files, read tensor by tensor by a reader that trusts nothing."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import torch

import subnet_kernels
from subnet_ft.deltas.compression import check_zstd, decompress
from subnet_ft.deltas.delta import Delta, TensorDelta
from subnet_ft.deltas.header import (
    BITS,
    DTYPES,
    SUFFIX,
    VALUES,
    TensorEntry,
    read_header,
    recorded_sha256,
)
from subnet_ft.errors import DeltaFileError, DeltaMismatchError
from subnet_ft.masks import ModelRecord, SubnetMask

_BLOCK = 1 << 22


class DeltaFile:
    """A delta file, opened: its header is checked and its SHA-256 compared; values are read when asked for.

    Args:
        path: A `NAME.delta.safetensors` file.
        mask: The mask that has the positions, where the file only refers to one.

    Raises:
        DeltaFileError: The file is missing, damaged, or contradicts the format.
        DeltaMismatchError: The file refers to a mask, and `mask` is none or another one.
    """

    def __init__(self, path: str | Path, mask: SubnetMask | None = None) -> None:
        self.path = Path(path)
        with _reading(self.path) as file:
            self.header, self._stored, start = read_header(self.path, file)
            self.sha256 = _checked_sha256(self.path, file, start)
            self.nbytes = file.tell()
        if self.header.encoding == "zstd":
            check_zstd(f"to read `{self.path}`")
        self._mask: SubnetMask | None = None
        if mask is not None:
            self._take_mask(mask)

    def __repr__(self) -> str:
        return f"DeltaFile({str(self.path)!r}, {len(self.entries)} tensors)"

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """Every parameter of the model, in its order."""
        return self.header.entries

    @property
    def num_values(self) -> int:
        """K, the number of weights that get a new value."""
        return sum(entry.count for entry in self.entries.values())

    @property
    def num_parameters(self) -> int:
        """N, the number of weights of the model."""
        return sum(entry.num_elements for entry in self.entries.values())

    @property
    def density(self) -> float:
        """K / N; 0 for a model without weights."""
        return self.num_values / max(self.num_parameters, 1)

    @property
    def base(self) -> ModelRecord:
        """The model that the delta belongs to."""
        return ModelRecord(
            self.header.base_name,
            self.header.base_revision,
            {name: entry.dtype for name, entry in self.entries.items()},
            {name: entry.base for name, entry in self.entries.items()},
        )

    @property
    def has_positions(self) -> bool:
        """Whether its tensors can be read: the positions are in the file, or in a mask that was given."""
        return self.header.mask_fingerprint is None or self._mask is not None

    def with_mask(self, mask: SubnetMask) -> DeltaFile:
        """Return the same file with the mask that it refers to; nothing is read again.

        Raises:
            DeltaMismatchError: The file has its own positions, or refers to another mask.
        """
        found = copy.copy(self)
        found._take_mask(mask)
        return found

    def tensor(self, name: str) -> TensorDelta:
        """Read the positions and new values of one parameter.

        Raises:
            DeltaFileError: They contradict the header.
            DeltaMismatchError: The positions are in a mask that was not given.
        """
        entry = self.entries[name]
        if not entry.count:
            nothing = torch.empty(0, dtype=torch.uint8)
            return TensorDelta(nothing, torch.empty(0, dtype=DTYPES[entry.dtype]), entry.shape)
        with _reading(self.path) as file:
            if self._mask is None:
                bits = self._read(file, BITS + name, entry.bits_nbytes)
            else:
                bits = self._mask.tensors[name].bits
            values = self._read(file, VALUES + name, entry.values_nbytes).view(DTYPES[entry.dtype])
        check_bits(self.path, name, entry, bits)
        return TensorDelta(bits, values, entry.shape)

    def delta(self) -> Delta:
        """Read everything into memory."""
        tensors = {name: self.tensor(name) for name in self.entries}
        result = {name: entry.result for name, entry in self.entries.items()}
        return Delta(tensors, self.base, result, self.header.source)

    def _read(self, file: io.FileIO, key: str, nbytes: int) -> torch.Tensor:
        if key not in self._stored:
            raise DeltaMismatchError(
                f"`{self.path}` has no positions of its own; they are in the mask with the fingerprint "
                f"{self.header.mask_fingerprint}. Name that mask file (`--mask`)."
            )
        stored = self._stored[key]
        file.seek(stored.start)
        data = bytearray(stored.nbytes)
        left = memoryview(data)
        while left:
            count = file.readinto(left)  # may be less than was asked for
            if not count:
                raise DeltaFileError(f"`{self.path}` ends within `{key}`: it changed while it was read. Try again.")
            left = left[count:]
        if self.header.encoding == "zstd":
            try:
                data = decompress(bytes(data), nbytes)
            except ValueError as error:
                raise DeltaFileError(f"`{self.path}`: `{key}` cannot be decompressed: {error}.") from error
        return torch.frombuffer(data, dtype=torch.uint8)

    def _take_mask(self, mask: SubnetMask) -> None:
        if self.header.mask_fingerprint is None:
            raise DeltaMismatchError(f"`{self.path}` has its own positions. Leave out the mask.")
        if mask.fingerprint != self.header.mask_fingerprint:
            raise DeltaMismatchError(
                f"`{self.path}` needs the mask with the fingerprint {self.header.mask_fingerprint}; the one given has "
                f"{mask.fingerprint}."
            )
        for name, entry in self.entries.items():
            tensor = mask.tensors.get(name)
            if tensor is None or (tensor.shape, tensor.count) != (entry.shape, entry.count):
                found = "nothing" if tensor is None else f"{tensor.count} weights of shape {tensor.shape}"
                raise DeltaFileError(
                    f"`{self.path}`: `{name}` has {entry.count} values of shape {entry.shape}; its mask has {found}."
                )
        self._mask = mask


def check_bits(path: Path, name: str, entry: TensorEntry, bits: torch.Tensor) -> None:
    """Check that a tensor's bits are as many as its entry says, and none of them padding.

    Raises:
        DeltaFileError: They are not.
    """
    num_elements = entry.num_elements
    if num_elements % 8 and int(bits[-1]) >> (num_elements % 8):
        raise DeltaFileError(f"`{path}`: padding bits of `{name}` are set, last byte {int(bits[-1]):#010b}.")
    found = subnet_kernels.count_bits(bits)
    if found != entry.count:
        raise DeltaFileError(f"`{path}`: `{name}` has {found} bits set but its header says {entry.count}.")


def _checked_sha256(path: Path, file: io.FileIO, start: bytes) -> str:
    recorded, zeroed = recorded_sha256(path, start)
    digest = hashlib.sha256(zeroed)
    block = bytearray(_BLOCK)
    view = memoryview(block)
    while count := file.readinto(block):
        digest.update(view[:count])
    if digest.hexdigest() != recorded:
        raise DeltaFileError(
            f"`{path}` is damaged: its SHA-256 is {digest.hexdigest()}, it records {recorded}. Get the file again."
        )
    return recorded


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[io.FileIO]:
    if path.is_dir():
        raise DeltaFileError(f"`{path}` is a folder, not a delta file. Name the file, `NAME{SUFFIX}`.")
    if not path.is_file():
        raise DeltaFileError(
            f"There is no delta file at `{path}`. `subnet-ft delta export BASE TUNED -o {path}` makes one."
        )
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise DeltaFileError(
            f"`{path}` cannot be read: {error.strerror or error}. Check its permissions, or name another file."
        ) from error
