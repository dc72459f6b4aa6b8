"""`BitMask`: where the compact values of every tile start, and the bits that it refuses."""

from __future__ import annotations

import pytest
import torch
from helpers import DENSITIES, SIZES, random_bits

from subnet_kernels import TILE_SIZE, BitMask, layout, pack_bits


def starts(mask: BitMask, segment_tiles: int) -> list[int]:
    """Return the slot at which every tile's compact values start."""
    return [int(mask.bases[tile // segment_tiles]) + int(mask.offsets[tile]) for tile in range(mask.num_tiles)]


def test_bit_mask_gives_the_numbers_of_its_example() -> None:
    dense = torch.zeros(1030, dtype=torch.bool)
    dense[[0, 3, 1028]] = True
    mask = BitMask.from_bits(pack_bits(dense), 1030)
    assert (mask.offsets.tolist(), mask.bases.tolist(), mask.count) == ([0, 2], [0], 3)
    assert (mask.num_tiles, mask.is_full, mask.device.type) == (2, False, "cpu")
    assert mask.nbytes == 129 + 2 * 4 + 8


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("segment_tiles", [1, 3, 1 << 20])
def test_bit_mask_knows_where_every_tile_starts(
    size: int, density: float, segment_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SEGMENT_TILES", segment_tiles)
    dense = random_bits(size, density)
    mask = BitMask.from_bits(pack_bits(dense), size)
    num_tiles = -(-size // TILE_SIZE)
    assert starts(mask, segment_tiles) == [int(dense[: tile * TILE_SIZE].sum()) for tile in range(num_tiles)]
    assert mask.bases.numel() == -(-num_tiles // segment_tiles)
    assert mask.offsets[::segment_tiles].eq(0).all(), "offsets count from their segment's start"
    assert (mask.offsets.dtype, mask.bases.dtype) == (torch.int32, torch.int64)
    assert (mask.count, mask.is_full) == (int(dense.sum()), bool(dense.all()))


def test_bit_mask_of_nothing_is_empty() -> None:
    mask = BitMask.from_bits(torch.empty(0, dtype=torch.uint8), 0)
    assert (mask.num_tiles, mask.count, mask.bases.tolist()) == (0, 0, [0])


def test_bit_mask_shares_the_bits_on_the_cpu() -> None:
    bits = pack_bits(random_bits(5000, 0.2))
    assert BitMask.from_bits(bits, 5000).bits.data_ptr() == bits.data_ptr()


def test_bit_mask_pads_to_whole_tiles_for_other_devices() -> None:
    bits = pack_bits(random_bits(1030, 1.0))
    padded = layout._padded(bits)
    assert padded.shape == (256,)
    assert torch.equal(padded[:129], bits)
    assert not padded[129:].any()


@pytest.mark.parametrize("bit", [3, 7])
def test_bit_mask_refuses_a_padding_bit(bit: int) -> None:
    with pytest.raises(ValueError, match="padding bit behind its last element, 10"):
        BitMask.from_bits(torch.tensor([0, 1 << bit], dtype=torch.uint8), 11)


@pytest.mark.parametrize("bits", [torch.zeros(3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int8)])
def test_bit_mask_refuses_bits_of_another_length_or_dtype(bits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"mask of 16 elements is uint8 of shape \(2,\), got"):
        BitMask.from_bits(bits, 16)
