"""A checkpoint in memory, for tests that compare weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from subnet_ft.masks import ModelRecord, format_fingerprint
from subnet_kernels import fingerprint


@dataclass(frozen=True)
class Spec:
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class MemoryCheckpoint:
    """What a `Checkpoint` gives, from tensors; it counts how often each is read."""

    name: str
    values: dict[str, torch.Tensor]
    reads: dict[str, int] = field(default_factory=dict)

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: Spec(tuple(value.shape), value.dtype) for name, value in self.values.items()}

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.values if names is None else names:
            self.reads[name] = self.reads.get(name, 0) + 1
            yield name, self.values[name]

    def pieces(self, size: int, names: Iterable[str] | None = None) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        for name, value in self.tensors(names):
            flat = value.reshape(-1)
            yield name, (flat[start : start + size] for start in range(0, flat.numel(), size))

    def record(self) -> ModelRecord:
        """Return the record of it that a mask holds."""
        return ModelRecord(
            self.name,
            dtypes={name: str(value.dtype).removeprefix("torch.") for name, value in self.values.items()},
            fingerprints={name: format_fingerprint(fingerprint(value)) for name, value in self.values.items()},
        )
