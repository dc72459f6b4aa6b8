"""The additive fingerprint of a tensor, in one pass that the compiler turns into vector instructions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from subnet_kernels.cpu.jit import compiled
from subnet_kernels.cpu.threads import run, split
from subnet_kernels.layout import TILE_SIZE, BitMask
from subnet_kernels.reference.fingerprint import SEEDS
from subnet_kernels.reference.splitmix import MULTIPLIERS
from subnet_kernels.reference.views import bits_view

_SMALL = 1 << 14  # elements below which a second thread costs more than it saves
_FIRST_SEED, _SECOND_SEED = (np.uint64(seed) for seed in SEEDS)
_FIRST_MULTIPLIER, _SECOND_MULTIPLIER = (np.uint64(multiplier) for multiplier in MULTIPLIERS)


def fingerprint(tensor: torch.Tensor, *, offset: int, outside: BitMask | None) -> tuple[int, int]:
    """Sum the mixes of all elements of `tensor`, or of those outside a mask, under both seeds, modulo 2**64."""
    flat = bits_view(tensor).view(-1).numpy()
    num_tiles = -(-flat.size // TILE_SIZE)
    tasks = []
    for start, stop in split(num_tiles, 1 if flat.size < _SMALL else None):
        first, last = start * TILE_SIZE, min(stop * TILE_SIZE, flat.size)
        bits = () if outside is None else (outside.bits[first // 8 : (last + 7) // 8].numpy(),)
        tasks.append((flat[first:last], offset + first, *bits))
    sums = run(sums_of_mixes if outside is None else _sums_outside, tasks)
    return sum(int(pair[0]) for pair in sums) % 2**64, sum(int(pair[1]) for pair in sums) % 2**64


@compiled
def mix(x: Any) -> Any:
    """Mix the bits of a uint64: the finaliser of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST_MULTIPLIER
    x = (x ^ (x >> np.uint64(27))) * _SECOND_MULTIPLIER
    return x ^ (x >> np.uint64(31))


@compiled
def sums_of_mixes(values: Any, offset: int) -> tuple[Any, Any]:
    """Return the fingerprint of (n,) integers of which the first has the flat index `offset`."""
    first_sum, second_sum = np.uint64(0), np.uint64(0)
    start = np.uint64(offset)
    for i in range(values.size):
        index, value = start + np.uint64(i), np.uint64(np.int64(values[i]))
        first_sum += mix(mix(index + _FIRST_SEED) + value)
        second_sum += mix(mix(index + _SECOND_SEED) + value)
    return first_sum, second_sum


@compiled
def sums_of_pair(base: Any, tuned: Any, offset: int) -> tuple[Any, Any, Any, Any]:
    """Return the fingerprints of two (n,) arrays of integers; they share the mix of the index."""
    base_first, base_second, tuned_first, tuned_second = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    start = np.uint64(offset)
    for i in range(base.size):
        index, old, new = start + np.uint64(i), np.uint64(np.int64(base[i])), np.uint64(np.int64(tuned[i]))
        first, second = mix(index + _FIRST_SEED), mix(index + _SECOND_SEED)
        base_first += mix(first + old)
        base_second += mix(second + old)
        tuned_first += mix(first + new)
        tuned_second += mix(second + new)
    return base_first, base_second, tuned_first, tuned_second


@compiled
def _sums_outside(values: Any, offset: int, bits: Any) -> tuple[Any, Any]:
    """Do what `sums_of_mixes` does, without the elements whose bit is set."""
    first_sum, second_sum = np.uint64(0), np.uint64(0)
    for byte in range(bits.size):
        masked = np.uint64(bits[byte])
        part = values[8 * byte : 8 * byte + 8]
        start = np.uint64(offset + 8 * byte)
        for i in range(part.size):
            # All ones where the element counts, else zero.
            counts = ((masked >> np.uint64(i)) & np.uint64(1)) - np.uint64(1)
            index, value = start + np.uint64(i), np.uint64(np.int64(part[i]))
            first_sum += mix(mix(index + _FIRST_SEED) + value) & counts
            second_sum += mix(mix(index + _SECOND_SEED) + value) & counts
    return first_sum, second_sum
