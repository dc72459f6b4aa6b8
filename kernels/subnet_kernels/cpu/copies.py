"""Copies between the dense layout (N,) and the compact one (K,): decode a block, then one plain loop over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from subnet_kernels import layout
from subnet_kernels.cpu.decode import ROOM, decode
from subnet_kernels.cpu.jit import compiled
from subnet_kernels.cpu.threads import run, split
from subnet_kernels.layout import TILE_SIZE, BitMask

_BLOCK = 2 * TILE_SIZE  # elements whose positions stay in the first-level cache
_SMALL = 1 << 20  # elements below which a second thread costs more than it saves


def gather(dense: torch.Tensor, mask: BitMask, *, dtype: torch.dtype) -> torch.Tensor:
    """Copy the masked elements of (N,) into a new (K,)."""
    if mask.is_full:
        return dense.to(dtype, copy=True)
    compact = torch.empty(mask.count, dtype=dense.dtype)
    _over_tiles(_gather, dense.contiguous(), mask, compact)
    return compact.to(dtype)


def scatter(dense: torch.Tensor, mask: BitMask, compact: torch.Tensor) -> None:
    """Write (K,) into the masked elements of (N,), in place."""
    if mask.is_full:
        dense.copy_(compact)
    else:
        _over_tiles(_scatter, dense, mask, compact)


def swap(dense: torch.Tensor, mask: BitMask, compact: torch.Tensor) -> None:
    """Exchange (K,) with the masked elements of (N,), in place."""
    _over_tiles(_swap, dense, mask, compact)


def _over_tiles(function: Callable[..., Any], dense: torch.Tensor, mask: BitMask, compact: torch.Tensor) -> None:
    """Call `function` on runs of tiles side by side: bits, first, last, dense, compact from the run's slot on."""
    bits, dense_bits, compact_bits = mask.bits.numpy(), _as_integers(dense), _as_integers(compact)
    tasks = []
    for start, stop in split(mask.num_tiles, 1 if mask.num_elements < _SMALL else None):
        if start < stop:
            slot = int(mask.bases[start // layout.SEGMENT_TILES]) + int(mask.offsets[start])
            last = min(stop * TILE_SIZE, mask.num_elements)
            tasks.append((bits, start * TILE_SIZE, last, dense_bits, compact_bits[slot:]))
    run(function, tasks)


def _as_integers(tensor: torch.Tensor) -> np.ndarray:
    """View a contiguous tensor as integers of its width: a copy of those changes no bit, not even of a NaN."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    view: np.ndarray = tensor.detach().view(kind).numpy()
    return view


@compiled
def _gather(bits: Any, start: int, stop: int, dense: Any, compact: Any) -> None:
    positions = np.empty(_BLOCK + ROOM, dtype=np.int32)
    slot = 0
    for first in range(start, stop, _BLOCK):
        count = decode(bits, first, min(first + _BLOCK, stop), positions)
        source, target = dense[first:], compact[slot:]
        for i in range(count):
            target[i] = source[positions[i]]
        slot += count


@compiled
def _scatter(bits: Any, start: int, stop: int, dense: Any, compact: Any) -> None:
    positions = np.empty(_BLOCK + ROOM, dtype=np.int32)
    slot = 0
    for first in range(start, stop, _BLOCK):
        count = decode(bits, first, min(first + _BLOCK, stop), positions)
        target, source = dense[first:], compact[slot:]
        for i in range(count):
            target[positions[i]] = source[i]
        slot += count


@compiled
def _swap(bits: Any, start: int, stop: int, dense: Any, compact: Any) -> None:
    positions = np.empty(_BLOCK + ROOM, dtype=np.int32)
    slot = 0
    for first in range(start, stop, _BLOCK):
        count = decode(bits, first, min(first + _BLOCK, stop), positions)
        left, right = dense[first:], compact[slot:]
        for i in range(count):
            kept = left[positions[i]]
            left[positions[i]] = right[i]
            right[i] = kept
        slot += count
