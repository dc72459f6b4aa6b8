"""Moving the masked part of a dense gradient into its compact buffer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from subnet_kernels.cpu.blocks import block_size, find, read_dense
from subnet_kernels.cpu.jit import compiled, compiled_sum
from subnet_kernels.cpu.moves import ROOM
from subnet_kernels.cpu.table import KINDS
from subnet_kernels.cpu.threads import run, split
from subnet_kernels.layout import SEGMENT_TILES, TILE_SIZE, BitMask

_SMALL = 1 << 19  # elements below which a second thread costs more than it saves


def compact(dense: torch.Tensor, mask: BitMask, out: torch.Tensor, *, accumulate: bool, scale: float) -> torch.Tensor:
    """Put the masked elements of (N,) times `scale` into (K,) `out`; return the sum of squares of `out`."""
    arguments = (
        KINDS[dense.dtype], dense.data_ptr(), mask.bits.data_ptr(), mask.num_elements, mask.count, out.numpy(),
        accumulate, np.float32(scale),
    )  # fmt: skip
    tasks = []
    for start, stop in split(mask.num_tiles, 1 if mask.num_elements < _SMALL else None):
        # Most tensors are one task, and reading a number from a tensor takes longer than a small one's whole update.
        slot = int(mask.bases[start // SEGMENT_TILES]) + int(mask.offsets[start]) if start else 0
        tasks.append((*arguments, start * TILE_SIZE, min(stop * TILE_SIZE, mask.num_elements), slot))
    return torch.tensor(sum(run(_compact, tasks)), dtype=torch.float64)


@compiled
def _compact(
    kind: int, dense: int, bits: int, num_elements: int, count: int, out: Any, accumulate: bool, scale: Any,
    start: int, stop: int, slot: int,
) -> float:  # fmt: skip
    positions = np.empty(ROOM, dtype=np.int32)
    values = np.empty(ROOM, dtype=np.float32)
    buffer16 = np.empty(ROOM, dtype=np.uint16)
    is_full = count == num_elements
    size = block_size(num_elements, count)
    total = 0.0
    for first in range(start, stop, size):
        last = min(first + size, stop)
        n = last - first if is_full else find(bits, first, last, positions)
        read_dense(kind, dense, bits, first, last, positions, is_full, values, buffer16, n)
        total += _add(values, out[slot : slot + n], accumulate, scale, n)
        slot += n
    return total


@compiled
def _add(block: Any, out: Any, accumulate: bool, scale: Any, n: int) -> float:
    """Put (n,) `block` times `scale` into (n,) `out`; return the sum of squares of `out`."""
    if accumulate:
        for i in range(n):
            out[i] = out[i] + block[i] * scale
    else:
        for i in range(n):
            out[i] = block[i] * scale
    return float(sum_of_squares(out, n))


@compiled_sum
def sum_of_squares(values: Any, n: int) -> float:
    """Return the sum of squares of (n,) float32, in float64."""
    total = 0.0
    for i in range(n):
        value = np.float64(values[i])
        total += value * value
    return total
