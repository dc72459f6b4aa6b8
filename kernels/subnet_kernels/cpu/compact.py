"""Moving the masked part of a dense gradient into its compact buffer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from subnet_kernels.cpu.blocks import BLOCK, ROOM, load_grad
from subnet_kernels.cpu.decode import decode
from subnet_kernels.cpu.jit import compiled
from subnet_kernels.cpu.table import FLOAT32, KINDS
from subnet_kernels.cpu.threads import run, split
from subnet_kernels.layout import SEGMENT_TILES, TILE_SIZE, BitMask

_SMALL = 1 << 15  # elements below which a second thread costs more than it saves


def compact(
    dense: torch.Tensor, mask: BitMask, out: torch.Tensor, *, accumulate: bool, scale: float
) -> torch.Tensor:
    """Put the masked elements of (N,) times `scale` into (K,) `out`; return the sum of squares of `out`."""
    kind = KINDS[dense.dtype]
    bits16 = dense.view(torch.int16) if kind != FLOAT32 else dense.view(torch.int32).view(torch.int16)
    values32 = dense if kind == FLOAT32 else torch.empty(0)
    arguments = (
        kind, bits16.numpy().view(np.uint16), values32.numpy(), mask.bits.numpy(), mask.is_full, out.numpy(),
        accumulate, np.float32(scale),
    )  # fmt: skip
    tasks = []
    for start, stop in split(mask.num_tiles, 1 if mask.num_elements < _SMALL else None):
        slot = int(mask.bases[start // SEGMENT_TILES]) + int(mask.offsets[start]) if mask.num_tiles else 0
        tasks.append((*arguments, start * TILE_SIZE, min(stop * TILE_SIZE, mask.num_elements), slot))
    return torch.tensor(sum(run(_compact, tasks)), dtype=torch.float64)


@compiled
def _compact(
    kind: int, dense16: Any, dense32: Any, bits: Any, is_full: bool, out: Any, accumulate: bool, scale: Any,
    start: int, stop: int, slot: int,
) -> float:  # fmt: skip
    positions = np.empty(ROOM, dtype=np.int32)
    block = np.empty(ROOM, dtype=np.float32)
    total = 0.0
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        n = last - first if is_full else decode(bits, first, last, positions)
        load_grad(kind, dense16, dense32, first, positions, is_full, block, n)
        total += _add(block, out[slot : slot + n], accumulate, scale, n)
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
    # Eight sums side by side: one alone would wait for every addition, and may not be reordered.
    sums = np.zeros(8, dtype=np.float64)
    whole = n // 8 * 8
    for i in range(0, whole, 8):
        for lane in range(8):
            sums[lane] += np.float64(out[i + lane]) * np.float64(out[i + lane])
    for i in range(whole, n):
        sums[0] += np.float64(out[i]) * np.float64(out[i])
    return sums.sum()
