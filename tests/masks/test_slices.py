"""Parts of a mask begin at any bit."""

from __future__ import annotations

import pytest
import torch

import subnet_kernels
from subnet_ft.masks.slices import count_before, slice_bits


@pytest.mark.parametrize("size", [1, 7, 8, 9, 63, 64, 65, 200])
def test_slice_bits_gives_every_range_of_a_mask(size: int) -> None:
    dense = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.4
    bits = subnet_kernels.pack_bits(dense)
    for start in range(size + 1):
        assert count_before(bits, start) == int(dense[:start].sum())
        for count in range(size - start + 1):
            part = slice_bits(bits, start, count)
            assert part.dtype == torch.uint8
            assert part.numel() == (count + 7) // 8
            assert torch.equal(subnet_kernels.unpack_bits(part, count), dense[start : start + count])
            if count % 8:
                assert int(part[-1]) >> count % 8 == 0, "padding bits are zero"


def test_slice_bits_shares_nothing_with_the_mask() -> None:
    bits = subnet_kernels.pack_bits(torch.ones(16, dtype=torch.bool))
    slice_bits(bits, 0, 16).zero_()
    assert subnet_kernels.count_bits(bits) == 16


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 17), (16, 1), (3, -1)])
def test_slice_bits_refuses_what_lies_outside(start: int, count: int) -> None:
    with pytest.raises(ValueError, match="lie outside a mask of 2 bytes"):
        slice_bits(torch.zeros(2, dtype=torch.uint8), start, count)
