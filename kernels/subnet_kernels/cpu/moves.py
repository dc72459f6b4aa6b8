"""Masked elements of a block, between a dense tensor and a buffer, for every CPU: decode the positions, then loop.

`moves_avx512` holds the same functions for CPUs that do it without positions. All share these arguments:

    dense: Address (int64) of the whole dense tensor.
    bits: Address of the mask.
    first, last: The block, in flat elements; `first` is a multiple of 64.
    positions: (ROOM,) int32, what `find` left.
    buffer: (ROOM,) values in the order of the masked elements; what lies behind the last one is scratch.
    n: How many are masked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from subnet_kernels.cpu.decode import decode
from subnet_kernels.cpu.jit import as_pointer, compiled, trailing_zeros

MAX_BLOCK = 1 << 15
"""Most elements of a block."""
ROOM = MAX_BLOCK + 64
"""Length of a block's buffers: whole vectors and words are written, past the last element."""
SCRATCH = ROOM // 8
"""Length of the uint64 scratch of `put_changed16`."""


@compiled
def find(bits: int, first: int, last: int, positions: Any) -> int:
    """Count the masked elements and write their positions, counted from `first`."""
    return decode(carray(as_pointer(bits), (last + 7) // 8, np.uint8), first, last, positions)  # type: ignore[no-any-return]


@compiled
def take16(dense: int, bits: int, first: int, last: int, positions: Any, buffer: Any, n: int) -> None:
    """Read masked two-byte elements into `buffer`, uint16."""
    source = carray(as_pointer(dense + 2 * first), last - first, np.uint16)
    for i in range(n):
        buffer[i] = source[np.int64(positions[i])]


@compiled
def take32(dense: int, bits: int, first: int, last: int, positions: Any, buffer: Any, n: int) -> None:
    """Read masked four-byte elements into `buffer`, float32."""
    source = carray(as_pointer(dense + 4 * first), last - first, np.uint32)
    words = buffer.view(np.uint32)
    for i in range(n):
        words[i] = source[np.int64(positions[i])]


@compiled
def put16(dense: int, bits: int, first: int, last: int, positions: Any, buffer: Any, n: int) -> None:
    """Write `buffer`, uint16, into the masked elements; nothing between them is touched."""
    target = carray(as_pointer(dense + 2 * first), last - first, np.uint16)
    for i in range(n):
        target[np.int64(positions[i])] = buffer[i]


@compiled
def put32(dense: int, bits: int, first: int, last: int, positions: Any, buffer: Any, n: int) -> None:
    """Write `buffer`, float32, into the masked elements."""
    target = carray(as_pointer(dense + 4 * first), last - first, np.uint32)
    words = buffer.view(np.uint32)
    for i in range(n):
        target[np.int64(positions[i])] = words[i]


@compiled
def put_changed16(
    dense: int, bits: int, first: int, last: int, positions: Any, before: Any, after: Any, scratch: Any, n: int
) -> None:
    """Write those elements of `after` that differ from `before`; the cache lines of the others are not touched.

    Args:
        before, after: (ROOM,) uint16. In.
        scratch: (SCRATCH,) uint64.
    """
    target = carray(as_pointer(dense + 2 * first), last - first, np.uint16)
    changed = scratch.view(np.uint8)
    for i in range(n):
        changed[i] = np.uint8(before[i] != after[i])
    for i in range(n, n + 8):
        changed[i] = np.uint8(0)
    for word in range((n + 7) >> 3):
        left = scratch[word]
        while left != np.uint64(0):
            i = word * 8 + np.int64(trailing_zeros(left) >> np.uint64(3))
            left &= left - np.uint64(1)
            target[np.int64(positions[i])] = after[i]
