"""Packing, counting, gather and scatter against dense boolean indexing."""

from __future__ import annotations

import pytest
import torch
from helpers import DENSITIES, SIZES, random_bits, same_bits

from subnet_kernels import count_bits, gather, pack_bits, scatter, unpack_bits
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
    assert count_bits(packed) == int(dense.sum())
    assert not size % 8 or int(packed[-1]) >> (size % 8) == 0


@pytest.mark.parametrize("size", SIZES)
def test_the_form_for_other_devices_gives_the_same_bytes(size: int) -> None:
    dense = random_bits(size, 0.3)
    packed = pack_bits(dense)
    assert torch.equal(bitmap._pack_with_torch(dense), packed)
    assert torch.equal(bitmap._unpack_with_torch(packed, size), dense)


def test_pack_bits_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match=r"flat bool tensor, got torch\.uint8"):
        pack_bits(torch.zeros(3, dtype=torch.uint8))


def test_unpack_bits_refuses_a_wrong_length() -> None:
    with pytest.raises(ValueError, match=r"mask of 17 elements is uint8 of shape \(3,\)"):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), 17)


def test_gather_gives_the_values_of_its_example() -> None:
    bits = torch.tensor([0b1010], dtype=torch.uint8)
    assert gather(torch.tensor([1.0, 2.0, 3.0, 4.0]), bits, 2).tolist() == [2.0, 4.0]


def test_scatter_gives_the_values_of_its_example() -> None:
    dense = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scatter(dense, torch.tensor([0b1010], dtype=torch.uint8), torch.tensor([8.0, 9.0]))
    assert dense.tolist() == [1.0, 8.0, 3.0, 9.0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scatter_undoes_gather_and_leaves_the_rest_alone(size: int, density: float, dtype: torch.dtype) -> None:
    mask = random_bits(size, density)
    bits = pack_bits(mask)
    dense = torch.randn(size, generator=torch.Generator().manual_seed(3)).to(dtype)
    dense[~mask] = float("nan")
    values = gather(dense, bits, int(mask.sum()), dtype=dtype)
    assert same_bits(values, dense[mask])
    changed = dense.clone()
    scatter(changed, bits, -values)
    assert same_bits(changed[mask], -dense[mask])
    assert same_bits(changed[~mask], dense[~mask])


def test_gather_returns_a_copy_also_under_a_full_mask() -> None:
    dense = torch.ones(8)
    gather(dense, torch.tensor([0xFF], dtype=torch.uint8), 8).zero_()
    assert dense.tolist() == [1.0] * 8


def test_scatter_refuses_to_round() -> None:
    with pytest.raises(ValueError, match="round before scattering"):
        scatter(torch.zeros(8, dtype=torch.bfloat16), torch.tensor([1], dtype=torch.uint8), torch.ones(1))
