"""Triton's gather, scatter and swap against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, bit_mask, cases, poisoned, values
from helpers import random_bits, same_bits

from subnet_kernels import BitMask, pack_bits, reference
from subnet_kernels.gpu import gather, scatter, swap

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def case(size: int, density: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, BitMask]:
    """Return the mask as bool, a dense tensor poisoned off it, and the mask of the CPU."""
    chosen = random_bits(size, density)
    dense = poisoned(values(size, dtype, size), chosen)
    return chosen, dense, BitMask.from_bits(pack_bits(chosen), size)


def test_gather_scatter_and_swap_give_the_values_of_their_examples() -> None:
    mask = bit_mask(torch.tensor([False, True, False, True]))
    dense = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE)
    assert gather(dense, mask, dtype=torch.float32).tolist() == [2.0, 4.0]
    compact = torch.tensor([8.0, 9.0], device=DEVICE)
    swap(dense, mask, compact)
    assert (dense.tolist(), compact.tolist()) == ([1.0, 8.0, 3.0, 9.0], [2.0, 4.0])
    scatter(dense, mask, torch.tensor([5.0, 6.0], device=DEVICE))
    assert dense.tolist() == [1.0, 5.0, 3.0, 6.0]


@pytest.mark.parametrize(("size", "density", "dtype"), cases(*DTYPES))
def test_gather_equals_the_reference(size: int, density: float, dtype: torch.dtype) -> None:
    chosen, dense, mask = case(size, density, dtype)
    for target in {dtype, torch.float32}:
        found = gather(dense.to(DEVICE), bit_mask(chosen), dtype=target)
        assert same_bits(found.cpu(), reference.gather(dense, mask, dtype=target))


@pytest.mark.parametrize(("size", "density", "dtype"), cases(*DTYPES))
def test_scatter_and_swap_equal_the_reference_and_leave_off_mask_bits_alone(
    size: int, density: float, dtype: torch.dtype
) -> None:
    chosen, dense, mask = case(size, density, dtype)
    compact = values(mask.count, dtype, 1)
    scattered, swapped, exchanged = (tensor.to(DEVICE, copy=True) for tensor in (dense, dense, compact))
    scatter(scattered, bit_mask(chosen), compact.to(DEVICE))
    swap(swapped, bit_mask(chosen), exchanged)
    expected = dense.clone()
    expected[chosen] = compact
    assert same_bits(scattered.cpu(), expected)
    assert same_bits(swapped.cpu(), expected)
    assert same_bits(exchanged.cpu(), dense[chosen])


def test_swap_twice_is_nothing() -> None:
    chosen, dense, mask = case(5000, 0.3, torch.bfloat16)
    compact = values(mask.count, torch.bfloat16, 1)
    swapped, exchanged = dense.to(DEVICE, copy=True), compact.to(DEVICE, copy=True)
    for _ in range(2):
        swap(swapped, bit_mask(chosen), exchanged)
    assert same_bits(swapped.cpu(), dense)
    assert same_bits(exchanged.cpu(), compact)


@pytest.mark.gpu
def test_gather_and_scatter_reach_past_2_to_the_31_elements() -> None:
    size = 2**31 + 1500
    elements = torch.tensor([0, 5, 2**31 - 1, 2**31, 2**31 + 1030, size - 1])
    bits = torch.zeros((size + 7) // 8, dtype=torch.uint8)
    for element in elements.tolist():
        bits[element // 8] |= 1 << element % 8
    mask = BitMask.from_bits(bits, size, DEVICE)
    dense = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    compact = values(6, torch.bfloat16, 0).to(DEVICE)
    scatter(dense, mask, compact)
    assert torch.equal(dense[elements.to(DEVICE)], compact)
    assert torch.equal(gather(dense, mask, dtype=torch.bfloat16), compact)
    assert int(dense.count_nonzero()) == 6
