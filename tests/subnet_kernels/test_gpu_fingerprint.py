"""Triton's fingerprint against the reference: the very same numbers."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, bit_mask, values
from helpers import DENSITIES, SIZES, random_bits

from subnet_kernels import BitMask, pack_bits, reference
from subnet_kernels.gpu import fingerprint

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.bool, torch.int64)


def test_fingerprint_gives_the_numbers_of_its_example() -> None:
    assert fingerprint(torch.empty(0, device=DEVICE), offset=0, outside=None) == (0, 0)
    forth, back = torch.tensor([1.0, 2.0], device=DEVICE), torch.tensor([2.0, 1.0], device=DEVICE)
    both = fingerprint(forth, offset=0, outside=None), fingerprint(back, offset=0, outside=None)
    assert both[0][0] != both[1][0]
    assert both[0][1] != both[1][1]


@pytest.mark.parametrize("size", [1024, *SIZES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprint_equals_the_reference(size: int, dtype: torch.dtype) -> None:
    tensor = (values(size, torch.float32, 0) * 100).to(dtype)
    for offset in (0, 1, 2**33 + 5):
        expected = reference.fingerprint(tensor, offset=offset, outside=None)
        assert fingerprint(tensor.to(DEVICE), offset=offset, outside=None) == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
def test_fingerprint_outside_a_mask_equals_the_reference(size: int, density: float) -> None:
    chosen = random_bits(size, density)
    tensor = values(size, torch.bfloat16, 0)
    mask = BitMask.from_bits(pack_bits(chosen), size)
    expected = reference.fingerprint(tensor, offset=0, outside=mask)
    assert fingerprint(tensor.to(DEVICE), offset=0, outside=bit_mask(chosen)) == expected
    tensor[chosen] += 1.0
    assert fingerprint(tensor.to(DEVICE), offset=0, outside=bit_mask(chosen)) == expected


def test_fingerprint_reads_any_shape_and_stride_in_c_order() -> None:
    tensor = values(30 * 70, torch.bfloat16, 0).view(30, 70).t()
    expected = reference.fingerprint(tensor, offset=0, outside=None)
    assert fingerprint(tensor.to(DEVICE), offset=0, outside=None) == expected
