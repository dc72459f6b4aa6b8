"""Packing and counting bits against dense booleans, for every backend."""

from __future__ import annotations

import pytest
import torch
from helpers import DENSITIES, SIZES, random_bits

from subnet_kernels import BitMask, choose, count_bits, pack_bits, unpack_bits
from subnet_kernels.reference import bitmap


def test_pack_bits_gives_the_bytes_of_its_example() -> None:
    packed = pack_bits(torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 1], dtype=torch.bool))
    assert packed.tolist() == [0b00000101, 0b00000001]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
def test_pack_bits_round_trips_and_pads_with_zeros(size: int, density: float) -> None:
    dense = random_bits(size, density)
    packed = pack_bits(dense)
    assert packed.shape == ((size + 7) // 8,)
    assert torch.equal(unpack_bits(packed, size), dense)
    assert not size % 8 or int(packed[-1]) >> (size % 8) == 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("size", [0, *SIZES, 1 << 21])
@pytest.mark.parametrize("density", DENSITIES)
def test_count_bits_counts_them(size: int, density: float, backend: str) -> None:
    dense = random_bits(size, density)
    count = choose("count_bits", torch.device("cpu"), backend).function
    assert count(pack_bits(dense)) == int(dense.sum())


def test_count_bits_reads_a_slice_of_bytes() -> None:
    packed = pack_bits(random_bits(1000, 0.5))
    assert count_bits(packed[1::2]) + count_bits(packed[::2]) == count_bits(packed)


@pytest.mark.parametrize("size", SIZES)
def test_the_form_for_other_devices_gives_the_same_bytes(size: int) -> None:
    dense = random_bits(size, 0.3)
    packed = pack_bits(dense)
    assert torch.equal(bitmap._pack_with_torch(dense), packed)
    assert torch.equal(bitmap._unpack_with_torch(packed, size), dense)


@pytest.mark.parametrize("size", SIZES)
def test_indices_are_those_of_the_set_bits(size: int) -> None:
    dense = random_bits(size, 0.3)
    assert torch.equal(bitmap.indices(BitMask.from_bits(pack_bits(dense), size)), dense.nonzero().view(-1))


def test_pack_bits_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match=r"flat bool tensor, got torch\.uint8"):
        pack_bits(torch.zeros(3, dtype=torch.uint8))


def test_unpack_bits_refuses_a_wrong_length() -> None:
    with pytest.raises(ValueError, match=r"mask of 17 elements is uint8 of shape \(3,\)"):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), 17)
