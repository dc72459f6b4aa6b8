"""Triton's compaction against the reference: values bit for bit, sums within the rounding of one float64 sum."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, bit_mask, cases, poisoned, values
from helpers import random_bits, same_bits

from subnet_kernels import BitMask, pack_bits, reference
from subnet_kernels.gpu import compact

# At most eight squares are added in float32, where each addition errs by at most 2**-24 of the sum.
SUM_RTOL = 8 * 2.0**-24


def test_compact_gives_the_values_of_its_example() -> None:
    mask = bit_mask(torch.tensor([False, True, False, True]))
    out = torch.ones(2, device=DEVICE)
    dense = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE)
    total = compact(dense, mask, out, accumulate=True, scale=2.0)
    assert (out.tolist(), total.item(), total.dtype, total.shape) == ([5.0, 9.0], 106.0, torch.float64, ())


@pytest.mark.parametrize(("size", "density", "dtype"), cases(torch.bfloat16, torch.float16, torch.float32))
def test_compact_equals_the_reference(size: int, density: float, dtype: torch.dtype) -> None:
    chosen = random_bits(size, density)
    mask = BitMask.from_bits(pack_bits(chosen), size)
    dense = poisoned(values(size, dtype, size), chosen)
    for accumulate in (False, True):
        # What is overwritten may hold anything.
        start = values(mask.count, torch.float32, 1) if accumulate else torch.full((mask.count,), float("nan"))
        expected, found = start.clone(), start.to(DEVICE, copy=True)
        expected_sum = reference.compact(dense, mask, expected, accumulate=accumulate, scale=0.3)
        found_sum = compact(dense.to(DEVICE), bit_mask(chosen), found, accumulate=accumulate, scale=0.3)
        assert same_bits(found.cpu(), expected)
        torch.testing.assert_close(found_sum.cpu(), expected_sum, rtol=SUM_RTOL, atol=0.0)


def test_compact_notices_one_square_that_is_missing() -> None:
    """The tolerance is far below what one of 1,600 equal elements adds."""
    chosen = random_bits(8000, 0.2)
    dense = chosen.float()
    total = compact(dense.to(DEVICE), bit_mask(chosen), torch.empty(int(chosen.sum()), device=DEVICE),
                    accumulate=False, scale=1.0)  # fmt: skip
    assert total.item() == chosen.sum().item()
    assert SUM_RTOL * total.item() < 0.1


def test_compact_sums_in_the_same_order_every_time() -> None:
    chosen = random_bits(5000, 0.5)
    dense = poisoned(values(5000, torch.bfloat16, 0), chosen).to(DEVICE)
    out = torch.empty(int(chosen.sum()), device=DEVICE)
    sums = {compact(dense, bit_mask(chosen), out, accumulate=False, scale=1.0).item() for _ in range(3)}
    assert len(sums) == 1
