"""Triton's changed bits against the reference, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_cases import DEVICE, values
from helpers import SIZES

from subnet_kernels import CRITERIA, reference
from subnet_kernels.gpu import changed_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INF, NAN = math.inf, math.nan


def assert_as_reference(base: torch.Tensor, tuned: torch.Tensor, criterion: str, tolerance: float) -> None:
    expected, count = reference.changed_bits(base, tuned, criterion=criterion, tolerance=tolerance)
    found, found_count = changed_bits(base.to(DEVICE), tuned.to(DEVICE), criterion=criterion, tolerance=tolerance)
    assert (found.dtype, found.shape) == (torch.uint8, expected.shape)
    assert torch.equal(found.cpu(), expected)
    assert found_count == count


def test_changed_bits_gives_the_bits_of_its_example() -> None:
    base, tuned = torch.tensor([1.0, 2.0, 3.0], device=DEVICE), torch.tensor([1.0, 2.5, 3.0], device=DEVICE)
    bits, count = changed_bits(base, tuned, criterion="exact", tolerance=0.0)
    assert (bits.tolist(), count) == ([0b010], 1)


@pytest.mark.parametrize("size", [0, 1024, *SIZES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_changed_bits_equals_the_reference(size: int, dtype: torch.dtype, criterion: str) -> None:
    base = values(size, torch.float32, 0)
    noise = values(size, torch.float32, 1) * 10.0 ** -torch.arange(size).remainder(7)
    tuned = torch.where(torch.arange(size) % 3 == 0, base, base + noise)
    assert_as_reference(base.to(dtype), tuned.to(dtype), criterion, 0.0 if criterion == "exact" else 1e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool])
def test_changed_bits_compares_integers_exactly(dtype: torch.dtype) -> None:
    base = (values(3000, torch.float32, 0) * 2).to(dtype)
    assert_as_reference(base, base.flip(0), "exact", 0.0)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_changed_bits_treats_special_values_as_the_reference(criterion: str, dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, -NAN, 1e-30, 6e4], dtype=torch.float32).to(dtype)
    base, tuned = special.repeat_interleave(len(special)), special.repeat(len(special))
    for tolerance in (0.0, 1e-5, 2.0, INF):
        assert_as_reference(base, tuned, criterion, 0.0 if criterion == "exact" else tolerance)


def test_changed_bits_compares_with_the_tolerance_in_float32() -> None:
    base, tuned = torch.zeros(1), torch.tensor([0.1])
    for tolerance in (0.1, math.nextafter(0.1, 1.0), 0.0999999):
        assert_as_reference(base, tuned, "absolute", tolerance)
