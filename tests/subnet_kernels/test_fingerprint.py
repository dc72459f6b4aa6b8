"""The additive fingerprint against a plain-Python twin, and what it must notice, for every backend."""

from __future__ import annotations

import pytest
import torch
from helpers import DENSITIES, SIZES, random_bits

from subnet_kernels import BitMask, choose, fingerprint, pack_bits

MASK = 2**64 - 1
SEEDS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        pytest.importorskip("numba")
        torch.set_num_threads(3)  # large tensors are cut into runs of tiles
    monkeypatch.setenv("SUBNET_KERNELS_BACKEND", request.param)
    return str(request.param)


def added(*parts: tuple[int, int]) -> tuple[int, int]:
    return sum(part[0] for part in parts) & MASK, sum(part[1] for part in parts) & MASK


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
    assert fingerprint(tensor) == added(*parts)


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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_fingerprint_equals_the_reference(size: int, dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 255, (size, dtype.itemsize), dtype=torch.uint8).view(dtype).view(-1)
    definition = choose("fingerprint", tensor.device, "reference").function
    assert fingerprint(tensor, offset=2**33) == definition(tensor, offset=2**33, outside=None)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fingerprint_outside_a_mask_sees_only_the_rest(size: int, density: float, dtype: torch.dtype) -> None:
    dense = random_bits(size, density)
    mask, inverse = (BitMask.from_bits(pack_bits(each), size) for each in (dense, ~dense))
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
    outside = fingerprint(tensor, offset=2**31, outside=mask)
    assert added(outside, fingerprint(tensor, offset=2**31, outside=inverse)) == fingerprint(tensor, offset=2**31)
    changed = tensor.clone()
    changed[dense] = float("nan")
    assert fingerprint(changed, offset=2**31, outside=mask) == outside
    if not dense.all():
        changed[int((~dense).nonzero()[-1])] += 1
        assert fingerprint(changed, offset=2**31, outside=mask) != outside


def test_fingerprint_outside_a_mask_reads_in_c_order() -> None:
    dense = random_bits(12, 0.5)
    mask = BitMask.from_bits(pack_bits(dense), 12)
    tensor = torch.arange(12.0).view(4, 3).t()
    assert fingerprint(tensor, outside=mask) == fingerprint(tensor.contiguous().view(-1), outside=mask)


def test_fingerprint_refuses_a_mask_of_another_length() -> None:
    with pytest.raises(ValueError, match="the mask has 8 elements, the tensor 9"):
        fingerprint(torch.zeros(9), outside=BitMask.from_bits(torch.ones(1, dtype=torch.uint8), 8))


def test_fingerprint_refuses_a_negative_offset() -> None:
    with pytest.raises(ValueError, match="`offset` must be >= 0, got -1"):
        fingerprint(torch.zeros(1), offset=-1)
