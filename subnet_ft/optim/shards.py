"""The part of a parameter that this process holds, where FSDP2 shards parameters on their first dimension."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from subnet_ft.errors import OptimizerError
from subnet_ft.masks.slices import slice_bits
from subnet_kernels import BitMask

if dist.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Part:
    """A contiguous range of the flat elements of a parameter.

    Args:
        start: Flat index of its first element.
        num_elements: How many it holds; 0 where there are more processes than rows.
        group: The processes whose parts make up the whole; `None` where this process holds all of it.
        device: Where tensors must lie that those processes exchange.
    """

    start: int
    num_elements: int
    group: dist.ProcessGroup | None = None
    device: torch.device | None = None


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return dist.is_available() and isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor, detached; the storage and its version counter are shared."""
    detached: Any = tensor.detach()
    if not is_sharded(tensor):
        return tensor.detach()
    found: torch.Tensor = detached.to_local()
    return found


def local_flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a contiguous tensor, as (N,); a view."""
    return local(tensor).view(-1)


def part_of(name: str, parameter: torch.Tensor) -> Part:
    """Return which part of a parameter this process holds.

    Raises:
        OptimizerError: It is sharded in another way than on its first dimension over one dimension of its mesh.
    """
    if not is_sharded(parameter):
        return Part(0, parameter.numel())
    tensor: Any = parameter
    mesh, placements = tensor.device_mesh, tensor.placements
    # A strided shard, as FSDP on top of tensor parallelism has, is a subclass of its own kind.
    sharded = [dim for dim, placement in enumerate(placements) if type(placement) is Shard and placement.dim == 0]
    others = [placement for placement in placements if not isinstance(placement, Replicate)]
    if len(sharded) != 1 or len(others) != 1:
        raise OptimizerError(
            f"`{name}` is distributed as {tuple(placements)} over a mesh of shape {tuple(mesh.shape)}. A masked "
            "optimizer takes parameters that one dimension of the mesh shards on their first dimension, as "
            "`fully_shard` does, and that its other dimensions replicate. Train without tensor or expert parallelism."
        )
    (dim,) = sharded
    rows = parameter.shape[0]
    width = parameter.numel() // rows if rows else 0
    each = -(-rows // mesh.size(dim))
    first = min(mesh.get_local_rank(dim) * each, rows)
    held = local(parameter).numel()
    if held != (min(first + each, rows) - first) * width:
        raise OptimizerError(
            f"`{name}` has {rows} rows over {mesh.size(dim)} processes, and this one holds {held} of its weights; rows "
            "are expected in equal chunks, as `fully_shard` cuts them."
        )
    return Part(first * width, held, mesh.get_group(dim), _device(mesh.device_type))


def part_mask(bits: torch.Tensor, part: Part, device: torch.device) -> BitMask:
    """Return the mask of a part on a device.

    Args:
        bits: (ceil(N / 8),) uint8, the mask of the whole parameter of N weights. In.
        part: What this process holds of it.
        device: Where the part lies.
    """
    if part.group is not None:
        bits = slice_bits(bits, part.start, part.num_elements)
    return BitMask.from_bits(bits, part.num_elements, device)


def groups_of(parts: Iterable[Part]) -> list[tuple[dist.ProcessGroup, torch.device]]:
    """Return the process groups over which parts add up, each once, in the order of the parts."""
    found: dict[int, tuple[dist.ProcessGroup, torch.device]] = {}
    for part in parts:
        if part.group is not None and part.device is not None:
            found.setdefault(id(part.group), (part.group, part.device))
    return list(found.values())


def sum_over_parts(values: Mapping[Any, torch.Tensor], parts: Mapping[Any, Part]) -> dict[Any, torch.Tensor]:
    """Sum small tensors of one shape and dtype over the processes that hold the other parts; one exchange per group.

    Args:
        values: What this process has, by key; the processes of a group have the same keys in the same order.
        parts: The part that each key belongs to.

    Returns:
        The sums, where `values` lie; values of whole parameters as they are.
    """
    summed = dict(values)
    for group, device in groups_of(parts[key] for key in values):
        keys = [key for key in values if parts[key].group is group]
        stacked = torch.stack([values[key].to(device) for key in keys])
        dist.all_reduce(stacked, group=group)
        summed.update({key: row.to(values[key].device) for key, row in zip(keys, stacked, strict=True)})
    return summed


def _device(kind: str) -> torch.device:
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def replica_groups(tensors: Iterable[torch.Tensor]) -> list[tuple[dist.ProcessGroup, torch.device]]:
    """Return the process groups that hold the same parts of sharded tensors: of the dimensions that replicate."""
    found: dict[int, tuple[dist.ProcessGroup, torch.device]] = {}
    for tensor in tensors:
        sharded: Any = tensor
        for dim, placement in enumerate(sharded.placements):
            if isinstance(placement, Replicate) and sharded.device_mesh.size(dim) > 1:
                group = sharded.device_mesh.get_group(dim)
                found.setdefault(id(group), (group, _device(sharded.device_mesh.device_type)))
    return list(found.values())
