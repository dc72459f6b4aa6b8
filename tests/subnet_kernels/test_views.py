"""The bits of a tensor as integers."""

from __future__ import annotations

import pytest
import torch

import subnet_kernels


@pytest.mark.parametrize(
    ("dtype", "one"),
    [
        (torch.bfloat16, 0x3F80),
        (torch.float16, 0x3C00),
        (torch.float32, 0x3F800000),
        (torch.float64, 0x3FF0000000000000),
        (torch.uint8, 1),
    ],
)
def test_bits_view_shows_the_bits_in_the_given_shape(dtype: torch.dtype, one: int) -> None:
    bits = subnet_kernels.bits_view(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).to(dtype).t())
    assert bits.tolist() == [[0, one], [one, 0]]
    assert not bits.is_floating_point()
    assert int(subnet_kernels.bits_view(torch.ones((), dtype=dtype))) == one
