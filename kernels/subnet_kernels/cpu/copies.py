"""Copies between the dense layout (N,) and the compact one (K,), block by block through buffers in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from subnet_kernels import layout
from subnet_kernels.cpu.blocks import find, put16, put32, take16, take32
from subnet_kernels.cpu.fingerprint import sums_of_mixes, sums_of_pair
from subnet_kernels.cpu.jit import compiled
from subnet_kernels.cpu.moves import ROOM
from subnet_kernels.cpu.threads import run, split
from subnet_kernels.layout import TILE_SIZE, BitMask

_BLOCK = 4 * TILE_SIZE  # elements whose positions and values stay in the first-level cache
_SMALL = 1 << 20  # elements below which a second thread costs more than it saves
_SMALL_SUMS = 1 << 14  # the same where fingerprints are taken, too

_INTEGERS = {2: torch.int16, 4: torch.int32}  # a copy of integers changes no bit, not even of a NaN


def gather(dense: torch.Tensor, mask: BitMask, *, dtype: torch.dtype) -> torch.Tensor:
    """Copy the masked elements of (N,) into a new (K,)."""
    if mask.is_full:
        return dense.to(dtype, copy=True)
    compact = torch.empty(mask.count, dtype=dense.dtype)
    run(_gather, _tasks(dense.contiguous(), mask, compact, _SMALL))
    return compact.to(dtype)


def scatter(dense: torch.Tensor, mask: BitMask, compact: torch.Tensor) -> None:
    """Write (K,) into the masked elements of (N,), in place."""
    if mask.is_full:
        dense.copy_(compact)
    else:
        run(_scatter, _tasks(dense, mask, compact, _SMALL))


def swap(dense: torch.Tensor, mask: BitMask, compact: torch.Tensor) -> None:
    """Exchange (K,) with the masked elements of (N,), in place."""
    run(_swap, _tasks(dense, mask, compact, _SMALL))


def patch(
    dense: torch.Tensor, mask: BitMask, compact: torch.Tensor, *, offset: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Do what `scatter` does; return the fingerprints of (N,) before and after."""
    parts = run(_patch, [(*task, offset) for task in _tasks(dense, mask, compact, _SMALL_SUMS)])
    sums = [sum(int(part[which]) for part in parts) % 2**64 for which in range(4)]
    return (sums[0], sums[1]), (sums[2], sums[3])


def _tasks(dense: torch.Tensor, mask: BitMask, compact: torch.Tensor, small: int) -> list[tuple[Any, ...]]:
    """Cut the work into runs of tiles: dense, its address, that of the bits, first, last, compact from its slot on."""
    integers = _INTEGERS[dense.element_size()]
    dense_bits, compact_bits = dense.detach().view(integers).numpy(), compact.detach().view(integers).numpy()
    tasks = []
    for start, stop in split(mask.num_tiles, 1 if mask.num_elements <= small else None):
        if start < stop:
            # Reading a number from a tensor takes longer than copying a small one.
            slot = int(mask.bases[start // layout.SEGMENT_TILES]) + int(mask.offsets[start]) if start else 0
            last = min(stop * TILE_SIZE, mask.num_elements)
            values = compact_bits[slot:] if slot else compact_bits
            tasks.append((dense_bits, dense.data_ptr(), mask.bits.data_ptr(), start * TILE_SIZE, last, values))
    return tasks


@compiled
def _gather(dense: Any, address: int, bits: int, start: int, stop: int, compact: Any) -> None:
    positions, narrow, wide = _buffers()
    slot = 0
    for first in range(start, stop, _BLOCK):
        last = min(first + _BLOCK, stop)
        count = find(bits, first, last, positions)
        if dense.itemsize == 2:
            take16(address, bits, first, last, positions, narrow, count)
            compact[slot : slot + count] = narrow.view(np.int16)[:count]
        else:
            take32(address, bits, first, last, positions, wide, count)
            compact[slot : slot + count] = wide.view(np.int32)[:count]
        slot += count


@compiled
def _scatter(dense: Any, address: int, bits: int, start: int, stop: int, compact: Any) -> None:
    positions, narrow, wide = _buffers()
    slot = 0
    for first in range(start, stop, _BLOCK):
        last = min(first + _BLOCK, stop)
        count = find(bits, first, last, positions)
        _put(dense, address, bits, first, last, positions, compact[slot : slot + count], narrow, wide)
        slot += count


@compiled
def _swap(dense: Any, address: int, bits: int, start: int, stop: int, compact: Any) -> None:
    positions, narrow, wide = _buffers()
    kept16, kept32 = np.empty(_BLOCK + 64, dtype=np.uint16), np.empty(_BLOCK + 64, dtype=np.float32)
    slot = 0
    for first in range(start, stop, _BLOCK):
        last = min(first + _BLOCK, stop)
        count = find(bits, first, last, positions)
        values = compact[slot : slot + count]
        if dense.itemsize == 2:
            take16(address, bits, first, last, positions, kept16, count)
            _put(dense, address, bits, first, last, positions, values, narrow, wide)
            values[:] = kept16.view(np.int16)[:count]
        else:
            take32(address, bits, first, last, positions, kept32, count)
            _put(dense, address, bits, first, last, positions, values, narrow, wide)
            values[:] = kept32.view(np.int32)[:count]
        slot += count


@compiled
def _patch(
    dense: Any, address: int, bits: int, start: int, stop: int, compact: Any, offset: int
) -> tuple[Any, Any, Any, Any]:
    positions, narrow, wide = _buffers()
    before = np.empty(_BLOCK, dtype=dense.dtype)
    zero = np.uint64(0)
    first_before, second_before, first_after, second_after = zero, zero, zero, zero
    slot = 0
    for first in range(start, stop, _BLOCK):
        last = min(first + _BLOCK, stop)
        count = find(bits, first, last, positions)
        after = dense[first:last]
        if count:
            old = before[: last - first]
            old[:] = after
            _put(dense, address, bits, first, last, positions, compact[slot : slot + count], narrow, wide)
            sums = sums_of_pair(old, after, offset + first)
            slot += count
        else:
            same = sums_of_mixes(after, offset + first)
            sums = (same[0], same[1], same[0], same[1])
        first_before, second_before = first_before + sums[0], second_before + sums[1]
        first_after, second_after = first_after + sums[2], second_after + sums[3]
    return first_before, second_before, first_after, second_after


@compiled
def _put(
    dense: Any, address: int, bits: int, first: int, last: int, positions: Any, values: Any, narrow: Any, wide: Any
) -> None:
    """Write the values of one block; a buffer has the room behind them that is read in whole vectors."""
    if dense.itemsize == 2:
        narrow.view(np.int16)[: values.size] = values
        put16(address, bits, first, last, positions, narrow, values.size)
    else:
        wide.view(np.int32)[: values.size] = values
        put32(address, bits, first, last, positions, wide, values.size)


@compiled
def _buffers() -> tuple[Any, Any, Any]:
    return np.empty(ROOM, dtype=np.int32), np.empty(ROOM, dtype=np.uint16), np.empty(ROOM, dtype=np.float32)
