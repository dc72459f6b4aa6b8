"""What `moves` does, for CPUs with AVX-512: whole words of the mask move whole vectors, and no position is needed.

A block's last elements, fewer than a vector, go one by one: nothing outside the tensor is read or written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from subnet_kernels.cpu.avx512 import (
    compress16,
    compress32,
    deposit,
    differ16,
    expand16,
    expand32,
    load32,
    load64,
)
from subnet_kernels.cpu.jit import as_pointer, compiled, popcount

_SPARSE = 128  # masked elements are rarer than one in so many: most words are empty, and a branch is predicted well
_FLAGS = 1024  # words of `scratch` for a bit per element of the largest block, with room; the words to write follow


@compiled
def find(bits: int, first: int, last: int, positions: Any) -> int:
    """Count the masked elements; positions are not written."""
    count = 0
    words = bits + first // 8
    for word in range((last - first) // 32):
        count += np.int64(popcount(np.uint64(load32(words + 4 * word))))
    return int(count + np.int64(popcount(np.uint64(_tail(bits, first, last)))))


@compiled
def take16(dense: int, bits: int, first: int, last: int, positions: Any, buffer: Any, n: int) -> None:
    """Read masked two-byte elements into `buffer`, uint16."""
    words, source, target = bits + first // 8, dense + 2 * first, buffer.ctypes.data
    is_sparse = n * _SPARSE < last - first
    whole = (last - first) // 32
    for word in range(whole):
        mask = load32(words + 4 * word)
        if is_sparse and mask == np.uint32(0):
            continue
        compress16(source + 64 * word, mask, target)
        target += 2 * np.int64(popcount(np.uint64(mask)))
    mask = _tail(bits, first, last)
    if mask != np.uint32(0):
        values = carray(as_pointer(source + 64 * whole), 32, np.uint16)
        at = n - np.int64(popcount(np.uint64(mask)))
        for i in range(32):
            if (mask >> np.uint32(i)) & np.uint32(1):
                buffer[at] = values[i]
                at += 1


@compiled
def take32(dense: int, bits: int, first: int, last: int, positions: Any, buffer: Any, n: int) -> None:
    """Read masked four-byte elements into `buffer`, float32."""
    words, source, target = bits + first // 8, dense + 4 * first, buffer.ctypes.data
    is_sparse = n * _SPARSE < last - first
    whole = (last - first) // 32
    for word in range(whole):
        mask = load32(words + 4 * word)
        if is_sparse and mask == np.uint32(0):
            continue
        low = np.uint16(mask & np.uint32(0xFFFF))
        compress32(source + 128 * word, low, target)
        target += 4 * np.int64(popcount(np.uint64(low)))
        high = np.uint16(mask >> np.uint32(16))
        compress32(source + 128 * word + 64, high, target)
        target += 4 * np.int64(popcount(np.uint64(high)))
    mask = _tail(bits, first, last)
    if mask != np.uint32(0):
        values = carray(as_pointer(source + 128 * whole), 32, np.uint32)
        into = buffer.view(np.uint32)
        at = n - np.int64(popcount(np.uint64(mask)))
        for i in range(32):
            if (mask >> np.uint32(i)) & np.uint32(1):
                into[at] = values[i]
                at += 1


@compiled
def put16(dense: int, bits: int, first: int, last: int, positions: Any, buffer: Any, n: int) -> None:
    """Write `buffer`, uint16, into the masked elements; nothing between them is touched."""
    words, target, source = bits + first // 8, dense + 2 * first, buffer.ctypes.data
    is_sparse = n * _SPARSE < last - first
    whole = (last - first) // 32
    for word in range(whole):
        mask = load32(words + 4 * word)
        if is_sparse and mask == np.uint32(0):
            continue
        expand16(source, mask, mask, target + 64 * word)
        source += 2 * np.int64(popcount(np.uint64(mask)))
    mask = _tail(bits, first, last)
    if mask != np.uint32(0):
        values = carray(as_pointer(target + 64 * whole), 32, np.uint16)
        at = n - np.int64(popcount(np.uint64(mask)))
        for i in range(32):
            if (mask >> np.uint32(i)) & np.uint32(1):
                values[i] = buffer[at]
                at += 1


@compiled
def put32(dense: int, bits: int, first: int, last: int, positions: Any, buffer: Any, n: int) -> None:
    """Write `buffer`, float32, into the masked elements."""
    words, target, source = bits + first // 8, dense + 4 * first, buffer.ctypes.data
    is_sparse = n * _SPARSE < last - first
    whole = (last - first) // 32
    for word in range(whole):
        mask = load32(words + 4 * word)
        if is_sparse and mask == np.uint32(0):
            continue
        low = np.uint16(mask & np.uint32(0xFFFF))
        expand32(source, low, low, target + 128 * word)
        source += 4 * np.int64(popcount(np.uint64(low)))
        high = np.uint16(mask >> np.uint32(16))
        expand32(source, high, high, target + 128 * word + 64)
        source += 4 * np.int64(popcount(np.uint64(high)))
    mask = _tail(bits, first, last)
    if mask != np.uint32(0):
        values = carray(as_pointer(target + 128 * whole), 32, np.uint32)
        words_of = buffer.view(np.uint32)
        at = n - np.int64(popcount(np.uint64(mask)))
        for i in range(32):
            if (mask >> np.uint32(i)) & np.uint32(1):
                values[i] = words_of[at]
                at += 1


@compiled
def put_changed16(
    dense: int, bits: int, first: int, last: int, positions: Any, before: Any, after: Any, scratch: Any, n: int
) -> None:
    """Write those elements of `after` that differ from `before`; the cache lines of the others are not touched.

    First one bit per compact element says whether it changed. Those bits, spread over a word of the mask, are the
    dense elements to write. Words without any are dropped without a branch, which could not be predicted.
    """
    old, new = before.ctypes.data, after.ctypes.data
    flags = scratch.view(np.uint32)[: (n + 31) // 32 + 2]
    for word in range((n + 31) // 32):
        flags[word] = differ16(old + 64 * word, new + 64 * word)
    hits = scratch[_FLAGS:]
    words, target, changed = bits + first // 8, dense + 2 * first, scratch.ctypes.data
    whole = (last - first) // 32
    num_hits, at = 0, 0
    for word in range(whole):
        mask = load32(words + 4 * word)
        here = np.uint32(load64(changed + (at >> 3)) >> np.uint64(at & 7))
        stored = deposit(here, mask)
        hits[num_hits] = (np.uint64(stored) << np.uint64(32)) | np.uint64((at << 16) | word)
        num_hits += np.int64(stored != np.uint32(0))
        at += np.int64(popcount(np.uint64(mask)))
    for number in range(num_hits):
        hit = hits[number]
        word = np.int64(hit & np.uint64(0xFFFF))
        start = np.int64((hit >> np.uint64(16)) & np.uint64(0xFFFF))
        expand16(new + 2 * start, load32(words + 4 * word), np.uint32(hit >> np.uint64(32)), target + 64 * word)
    mask = _tail(bits, first, last)
    if mask != np.uint32(0):
        values = carray(as_pointer(target + 64 * whole), 32, np.uint16)
        for i in range(32):
            if (mask >> np.uint32(i)) & np.uint32(1):
                if before[at] != after[at]:
                    values[i] = after[at]
                at += 1


@compiled
def _tail(bits: int, first: int, last: int) -> Any:
    """Return the bits of the elements behind the block's last whole word, uint32."""
    mask = np.uint32(0)
    count = (last - first) % 32
    if count:
        source = carray(as_pointer(bits), (last + 7) // 8, np.uint8)
        start = (last - count) // 8
        for byte in range((count + 7) // 8):
            mask |= np.uint32(np.uint32(source[start + byte]) << np.uint32(8 * byte))
    return mask
