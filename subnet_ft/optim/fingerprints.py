"""Fingerprints of parameters, also of those that several processes hold in parts: the sums of the parts add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

import subnet_kernels
from subnet_ft.optim.shards import local, part_of, sum_over_parts
from subnet_kernels import BitMask
from subnet_kernels.reference.splitmix import signed

_SPAN = 1 << 64


def fingerprints(
    tensors: Mapping[str, torch.Tensor], outside: Callable[[str], BitMask | None] = lambda name: None
) -> dict[str, tuple[int, int]]:
    """Return name to fingerprint of every tensor; the processes that hold parts of them call it together.

    Args:
        tensors: Name to tensor, in the same order everywhere.
        outside: Returns the mask of what this process holds of a tensor, which is left out; `None` leaves out nothing.
    """
    parts = {name: part_of(name, tensor) for name, tensor in tensors.items()}
    sums = {}
    for name, tensor in tensors.items():
        held = local(tensor)
        sums[name] = (0, 0)
        if held.numel():
            sums[name] = subnet_kernels.fingerprint(held, offset=parts[name].start, outside=outside(name))
    if all(part.group is None for part in parts.values()):
        return sums
    rows = {name: torch.tensor([signed(half) for half in pair]) for name, pair in sums.items()}
    summed = sum_over_parts(rows, parts)  # 64-bit integers wrap around, as the sums do
    return {name: (int(row[0]) % _SPAN, int(row[1]) % _SPAN) for name, row in summed.items()}
