"""The additive fingerprint against a plain-Python twin, and what it must notice."""

from __future__ import annotations

import pytest
import torch

from subnet_kernels import fingerprint

MASK = 2**64 - 1
SEEDS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_fingerprint(values: list[int], offset: int = 0) -> tuple[int, int]:
    sums = [
        sum(mix((mix((offset + index + seed) & MASK) + value) & MASK) for index, value in enumerate(values)) & MASK
        for seed in SEEDS
    ]
    return sums[0], sums[1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_fingerprint_equals_plain_python(dtype: torch.dtype) -> None:
    tensor = (torch.randn(99, generator=torch.Generator().manual_seed(1)) * 5).to(dtype)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    assert fingerprint(tensor, offset=7) == slow_fingerprint(tensor.view(bits).tolist(), 7)


def test_fingerprint_of_nothing_is_zero() -> None:
    assert fingerprint(torch.empty(0)) == (0, 0)


def test_fingerprint_adds_up_over_slices_also_past_its_chunk() -> None:
    tensor = torch.randn(200_001, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = [fingerprint(tensor[:131_071]), fingerprint(tensor[131_071:], offset=131_071)]
    assert fingerprint(tensor) == tuple(sum(pair) & MASK for pair in zip(*parts, strict=True))


def test_fingerprint_adds_up_past_two_to_the_31() -> None:
    tensor = torch.tensor([1.5, -2.0])
    assert fingerprint(tensor, offset=2**31 + 5) == slow_fingerprint(tensor.view(torch.int32).tolist(), 2**31 + 5)


def test_fingerprint_notices_one_bit_a_swap_and_a_sign() -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    start = fingerprint(tensor)
    one_bit = tensor.clone()
    one_bit.view(torch.int32)[500] ^= 1
    swapped = tensor.clone()
    swapped[[3, 4]] = tensor[[4, 3]]
    zero = tensor.clone()
    zero[7] = 0.0
    negative_zero = zero.clone()
    negative_zero[7] = -0.0
    found = [fingerprint(each) for each in (one_bit, swapped, zero, negative_zero)]
    for which in (0, 1):
        assert len({start[which], *(sums[which] for sums in found)}) == 5


def test_fingerprint_reads_in_c_order() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    assert fingerprint(tensor.t()) == fingerprint(tensor.t().contiguous())
    assert fingerprint(tensor) == fingerprint(tensor.view(-1))


def test_fingerprint_refuses_a_negative_offset() -> None:
    with pytest.raises(ValueError, match="`offset` must be >= 0, got -1"):
        fingerprint(torch.zeros(1), offset=-1)
