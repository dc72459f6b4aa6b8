"""Turning bits into positions, against numpy's `flatnonzero`."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import DENSITIES, SIZES, random_bits

from subnet_kernels import pack_bits

decoding = pytest.importorskip("subnet_kernels.cpu.decode", reason="needs numba")


@pytest.mark.parametrize("size", [*SIZES, 64, 65])
@pytest.mark.parametrize("density", [*DENSITIES, 0.9])
def test_decode_writes_the_positions_of_the_set_bits(size: int, density: float) -> None:
    dense = random_bits(size, density)
    bits = pack_bits(dense).numpy()
    for first, last in {(0, size), (0, size // 2), (size // 128 * 64, size), (size // 64 * 64, size // 64 * 64)}:
        positions = np.full(last - first + decoding.ROOM, -1, dtype=np.int32)
        count = decoding.decode(bits, first, last, positions)
        assert positions[:count].tolist() == np.flatnonzero(dense.numpy()[first:last]).tolist()


def test_decode_needs_no_aligned_bits_and_no_more_room_than_it_says() -> None:
    dense = random_bits(512, 0.7, seed=2)
    shifted = np.concatenate([np.zeros(1, dtype=np.uint8), pack_bits(dense).numpy()])[1:]
    positions = np.full(512 + decoding.ROOM + 1, -7, dtype=np.int32)
    count = decoding.decode(shifted, 0, 512, positions)
    assert positions[:count].tolist() == np.flatnonzero(dense.numpy()).tolist()
    assert positions[-1] == -7


def test_decode_ignores_bits_behind_the_last_element() -> None:
    positions = np.empty(70 + decoding.ROOM, dtype=np.int32)
    assert decoding.decode(np.full(16, 0xFF, dtype=np.uint8), 0, 70, positions) == 70
