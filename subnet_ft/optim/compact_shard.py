"""Compact values of which every process holds a range, as `torch.distributed.checkpoint` saves and loads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class CompactRange:
    """Which of the K compact values of a tensor this process holds.

    Args:
        start: The first.
        length: How many.
        count: K.
        device: Where they lie.
        group: The processes that hold the others; `None` where this one holds all.
        exchange: Where tensors must lie that those processes exchange.
    """

    start: int
    length: int
    count: int
    device: torch.device
    group: dist.ProcessGroup | None
    exchange: torch.device | None = None


class CompactShard(torch.Tensor):
    """A range of the compact values (K,) of a tensor, as a part of a saved state.

    torch takes plain tensors of one name for replicas and keeps one of them; this one is saved at its offset, and
    loaded into whatever ranges another number of processes has. Ranges without values are not saved. It is a tensor,
    because torch asks no other object for its parts; what is computed with it is a plain one.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    start: int
    """Where the values of this process begin among the K."""

    count: int
    """K."""

    @classmethod
    def of(cls, values: torch.Tensor, start: int, count: int) -> CompactShard:
        """Mark (K_local,) values, of which `count` in all, as those from `start` on; the storage is shared."""
        shard = values.detach().as_subclass(cls)
        shard.start, shard.count = start, count
        return shard

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]  # of sparse tensors, which this one never is
        """(K_local,) what this process holds; loading writes into it."""
        return self.as_subclass(torch.Tensor)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"CompactShard({self.values.numel()} of {self.count} values from {self.start} on)"

    def size(self, dim: int | None = None) -> Any:
        """Return the shape of the whole, as `torch.distributed.checkpoint` compares it."""
        return torch.Size([self.count])

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties.create_from_tensor(self.values), size=self.size()
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if not self.values.numel():
            return []
        return [ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=self.values.shape)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        if index.offset is not None and tuple(index.offset) != (self.start,):
            raise ValueError(f"`{index.fqn}` begins at {self.start} in this process, not at {tuple(index.offset)}")
        return self.values

    def whole(self, held: CompactRange, *, keep: bool = True) -> torch.Tensor | None:
        """Return all K values on the CPU, from the processes that hold them, which call it together.

        Args:
            held: The range of this process.
            keep: Whether this process wants them; `None` is returned where it does not.
        """
        assert held.group is not None  # what one process holds is whole
        device = held.exchange
        own = torch.tensor([self.start, self.values.numel()], device=device)
        sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(held.group))]
        dist.all_gather(sizes, own, group=held.group)
        ranges = [(int(size[0]), int(size[1])) for size in sizes]
        longest = max(length for _, length in ranges)
        padded = torch.nn.functional.pad(self.values.to(device), (0, longest - self.values.numel()))
        parts = [torch.empty_like(padded) for _ in ranges]
        dist.all_gather(parts, padded, group=held.group)
        if not keep:
            return None
        found = torch.empty(self.count, dtype=self.values.dtype)
        for part, (start, length) in zip(parts, ranges, strict=True):
            found[start : start + length] = part[:length].cpu()
        return found
