"""`Delta`: what training changed, as the new values of the changed weights; a sparse patch of its base."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import subnet_kernels
from subnet_ft.deltas.header import DTYPES, TensorEntry
from subnet_ft.errors import DeltaError
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask, TensorMask
from subnet_kernels import BitMask


@dataclass(frozen=True)
class TensorDelta:
    """The new values of one tensor's changed weights.

    Args:
        bits: (ceil(N / 8),) uint8 in C order of `shape`; empty when nothing changes.
        values: (K,) the new values in the stored dtype, in the order of the set bits.
        shape: Shape of the parameter.
    """

    bits: torch.Tensor
    values: torch.Tensor
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """K, the number of weights that get a new value."""
        return self.values.numel()

    @property
    def num_elements(self) -> int:
        """N, the number of weights of the tensor."""
        return math.prod(self.shape)

    @classmethod
    def build(cls, bits: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> TensorDelta:
        """Drop the bits when nothing changes."""
        return cls(bits if values.numel() else torch.empty(0, dtype=torch.uint8), values, shape)

    def full_bits(self) -> torch.Tensor:
        """Return (ceil(N / 8),) uint8, also for a tensor without new values."""
        return self.bits if self.count else torch.zeros((self.num_elements + 7) // 8, dtype=torch.uint8)

    def write(self, piece: torch.Tensor, start: int, used: int) -> int:
        """Write the new values of one flat piece of the tensor.

        Args:
            piece: (n,) elements `start` to `start + n`, in the stored dtype. In-out.
            start: Flat index of the first element, a multiple of 8.
            used: How many values belong to the elements before `start`.

        Returns:
            How many values were written.
        """
        part = self.part(start, piece.numel(), used)
        if part is None:
            return 0
        mask, values = part
        subnet_kernels.scatter(piece, mask, values)
        return mask.count

    def part(self, start: int, length: int, used: int) -> tuple[BitMask, torch.Tensor] | None:
        """Return the mask and the values of a stretch of the flat tensor; `None` where it gets no new value.

        Args:
            start: Flat index of the first element, a multiple of 8.
            length: Elements of the stretch.
            used: How many values belong to the elements before `start`.
        """
        if not self.count:
            return None
        mask = BitMask.from_bits(self.bits[start // 8 : (start + length + 7) // 8], length)
        return (mask, self.values[used : used + mask.count]) if mask.count else None


@dataclass(frozen=True)
class Delta:
    """A sparse patch of one base: applied to it, bit for bit the tuned model.

    Invariant: every parameter of the model has an entry in `tensors`, `base` and `result`, also those without a change;
    the values of a tensor have the dtype that `base` records for it.

    Args:
        tensors: Parameter name in memory, as in `SubnetMask`, to its new values.
        base: The model that the delta belongs to, complete: dtype and fingerprint of every tensor.
        result: Parameter name to the fingerprint, 32 hexadecimal digits, of the tensor after the delta.
        source: `kind` and what else says where the delta came from, such as the name of the tuned checkpoint.

    Raises:
        DeltaError: Names, sizes or dtypes contradict each other.
    """

    tensors: dict[str, TensorDelta]
    base: ModelRecord
    result: dict[str, str]
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, names in (
            ("dtypes of its base", self.base.dtypes),
            ("fingerprints of its base", self.base.fingerprints),
            ("fingerprints of its result", self.result),
        ):
            odd = self.tensors.keys() ^ names.keys()
            if odd:
                raise DeltaError(f"The tensors of the delta and the {what} differ in `{min(odd)}`.")
        for name, tensor in self.tensors.items():
            _check_tensor(name, tensor, self.base.dtypes[name])

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """What a delta file says about every parameter."""
        return {
            name: TensorEntry(
                tensor.shape, self.base.dtypes[name], tensor.count, self.base.fingerprints[name], self.result[name]
            )
            for name, tensor in self.tensors.items()
        }

    def tensor(self, name: str) -> TensorDelta:
        """Return the new values of one parameter."""
        return self.tensors[name]

    @property
    def mask(self) -> SubnetMask:
        """Which weights get a new value; it belongs to the delta's base and shares the delta's bits."""
        tensors = {name: TensorMask(tensor.bits, tensor.shape, tensor.count) for name, tensor in self.tensors.items()}
        return SubnetMask(tensors, Provenance(base=self.base, source={"kind": "delta"}))

    @classmethod
    def load(cls, path: str | Path, mask: SubnetMask | None = None) -> Delta:
        """Read a delta file into memory; everything in it is checked and nothing is unpickled.

        Args:
            path: A `NAME.delta.safetensors` file.
            mask: The mask that has the positions, where the file only refers to one.

        Raises:
            DeltaFileError: The file breaks its format.
            DeltaMismatchError: The file refers to another mask, or to one that was not given.
        """
        from subnet_ft.deltas.file import DeltaFile

        return DeltaFile(path, mask).delta()

    def save(self, path: str | Path, *, mask: SubnetMask | None = None, zstd: bool = False) -> Path:
        """Write the delta to one safetensors file, which appears whole or not at all; returns its path.

        Args:
            path: `NAME.delta.safetensors`.
            mask: Write values only, and refer to this mask for the positions, which must be the delta's.
            zstd: Compress.

        Raises:
            DeltaMismatchError: `mask` has other positions.
            DeltaFileError: The file cannot be written.
            MissingDependencyError: zstandard is not installed.
        """
        from subnet_ft.deltas.writing import save_delta

        return save_delta(self, Path(path), mask=mask, zstd=zstd)

    @property
    def num_values(self) -> int:
        """K, the number of weights that get a new value."""
        return sum(tensor.count for tensor in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """N, the number of weights of the model."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    def __repr__(self) -> str:
        return f"Delta({self.num_values:,} of {self.num_parameters:,} weights of `{self.base.name}`)"


def _check_tensor(name: str, tensor: TensorDelta, dtype: str) -> None:
    if dtype not in DTYPES:
        raise DeltaError(f"The base of the delta stores `{name}` in {dtype}; a delta holds {', '.join(DTYPES)} only.")
    expected = (tensor.num_elements + 7) // 8 if tensor.count else 0
    if tensor.bits.dtype != torch.uint8 or tensor.bits.shape != (expected,):
        raise DeltaError(
            f"The bits of `{name}` are {tensor.bits.dtype} of shape {tuple(tensor.bits.shape)}; a tensor of shape "
            f"{tensor.shape} with {tensor.count} new values has uint8 bits of shape ({expected},)."
        )
    if tensor.values.dim() != 1 or tensor.count > tensor.num_elements:
        raise DeltaError(
            f"The values of `{name}` have shape {tuple(tensor.values.shape)}; expected at most {tensor.num_elements} "
            "in one dimension."
        )
    found = str(tensor.values.dtype).removeprefix("torch.")
    if found != dtype:
        raise DeltaError(f"The values of `{name}` are {found} but its base is {dtype}; a delta holds the stored dtype.")
