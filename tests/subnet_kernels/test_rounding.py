"""The rounding rule, and the split of a master that loses nothing."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits

from subnet_kernels import round_to_bfloat16
from subnet_kernels.reference import join_master, split_master


def as_float(*patterns: int) -> torch.Tensor:
    signed = [pattern - 2**32 if pattern >= 2**31 else pattern for pattern in patterns]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


def as_pattern(value: torch.Tensor) -> list[int]:
    return [int(bits) & 0xFFFF for bits in value.view(torch.int16)]


@pytest.mark.parametrize(
    ("master", "rounded"),
    [
        (0x3F808000, 0x3F81),  # a tie goes away from zero, also from an even neighbour
        (0x3F818000, 0x3F82),
        (0xBF808000, 0xBF81),
        (0x3F807FFF, 0x3F80),
        (0x3F808001, 0x3F81),
        (0x7F7FFFFF, 0x7F80),  # the largest float32 rounds to infinity
        (0x7F800000, 0x7F80),
        (0xFF800000, 0xFF80),
        (0x80000000, 0x8000),  # negative zero stays negative
        (0x00008000, 0x0001),  # subnormal
        (0x7FFFFFFF, 0x7FC0),  # a NaN neither overflows to -0 ...
        (0x7F800001, 0x7FC0),  # ... nor rounds to infinity
    ],
)
def test_round_to_bfloat16_follows_its_rule(master: int, rounded: int) -> None:
    assert as_pattern(round_to_bfloat16(as_float(master))) == [rounded]


def test_round_to_bfloat16_is_nearest() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    ours, theirs = round_to_bfloat16(values), values.to(torch.bfloat16)
    same = (ours == theirs) | ((values.view(torch.int32) & 0xFFFF) == 0x8000)
    assert same.all()


def test_split_master_restores_every_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    ties = as_float(0x3F808000, 0x3F7F8000, 0xBF808000, 0x00008000, 0x7F7F8000, 0x7F800000, 0x80000000)
    masters = torch.cat([random[~random.isnan()], ties])
    weight, remainder = split_master(masters)
    assert same_bits(weight, round_to_bfloat16(masters))
    assert remainder.dtype == torch.int16
    assert same_bits(join_master(weight, remainder), masters)


def test_split_master_keeps_a_nan_a_nan() -> None:
    weight, remainder = split_master(as_float(0x7FFFFFFF, 0xFFC00001))
    assert join_master(weight, remainder).isnan().all()
