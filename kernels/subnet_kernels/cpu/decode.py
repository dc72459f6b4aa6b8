"""Turning the bits of a stretch of a mask into positions: the first step of every masked op on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from subnet_kernels.cpu.jit import compiled, popcount, trailing_zeros

ROOM = 16
"""Entries behind the last position that `decode` may write to."""


@compiled
def decode(bits: np.ndarray, first: int, last: int, positions: np.ndarray) -> int:
    """Write the positions of the set bits among the elements [first, last), counted from `first`; return their count.

    Args:
        bits: (B,) uint8 with B >= ceil(last / 8), contiguous; bit `i` of byte `j` is element `8 * j + i`. In.
        first: A multiple of 64.
        last: At least `first`, which it exceeds by less than 2**31.
        positions: (last - first + `ROOM`,) int32 or longer; what lies behind the count is scratch. Out.
    """
    count = 0
    whole = bits[first // 8 : last // 64 * 8].view(np.uint64)
    for number in range(whole.size):
        count += _decode_word(whole[number], number * 64, positions, count)
    tail = last % 64
    if tail:
        start = last // 64 * 8
        word = np.uint64(0)
        for byte in range((tail + 7) // 8):
            word |= np.uint64(bits[start + byte]) << np.uint64(8 * byte)
        word &= (np.uint64(1) << np.uint64(tail)) - np.uint64(1)
        count += _decode_word(word, whole.size * 64, positions, count)
    return count


@compiled
def _decode_word(word: np.uint64, base: int, positions: np.ndarray, at: int) -> Any:
    """Write `base` + the positions of the bits of `word` from slot `at` on; return their count.

    The first eight, and the second eight where there are more, are written whether they exist or not: a branch per
    word is predicted far better than one per bit.
    """
    count = np.int64(popcount(word))
    for slot in range(8):
        positions[at + slot] = base + np.int64(trailing_zeros(word))
        word &= word - np.uint64(1)
    if count > 8:
        for slot in range(8, 16):
            positions[at + slot] = base + np.int64(trailing_zeros(word))
            word &= word - np.uint64(1)
        for slot in range(16, count):
            positions[at + slot] = base + np.int64(trailing_zeros(word))
            word &= word - np.uint64(1)
    return count
