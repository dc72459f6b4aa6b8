"""The rounding rules, the split of a master that loses nothing, and the random bits of stochastic rounding."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits

from subnet_kernels import round_to_bfloat16, round_to_weights, rounding_key
from subnet_kernels.reference import join_master, round_stochastically, split_master
from subnet_kernels.reference.splitmix import mix, signed, splitmix64


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


def test_round_to_weights_knows_the_dtypes_of_weights() -> None:
    values = as_float(0x3F808000, 0x3F7F8000, 0xC2F6E979)
    assert same_bits(round_to_weights(values, torch.bfloat16), round_to_bfloat16(values))
    assert same_bits(round_to_weights(values, torch.float16), values.half())
    assert same_bits(round_to_weights(values, torch.float32), values)


KEY = rounding_key(seed=0, stream=3, step=7)


@pytest.mark.parametrize(
    ("bits", "share_up"),
    [
        (0x3F800000, 0.0),  # a bfloat16 never moves
        (0x3F800001, 2**-16),
        (0x3F804000, 0.25),
        (0x3F808000, 0.5),
        (0x3F80FFFF, 1 - 2**-16),
        (0xBFC04000, 0.25),  # away from zero below zero
        (0x3FFFC000, 0.75),  # up into the next binade
        (0x00004000, 0.25),  # subnormal
        (0x7F7F4000, 0.25),  # up to infinity
    ],
)
def test_round_stochastically_is_exact_in_the_mean_between_two_neighbours(bits: int, share_up: float) -> None:
    count = 200_000
    rounded = round_stochastically(as_float(bits).expand(count).contiguous(), torch.arange(count), KEY)
    lower, upper = as_float(bits & 0xFFFF0000), as_float((bits & 0xFFFF0000) + 0x10000)
    is_up = rounded.float() == upper
    assert (is_up | (rounded.float() == lower)).all()
    # Five standard deviations: one test in two million fails by chance, and the seed is fixed.
    assert abs(is_up.double().mean().item() - share_up) <= 5 * (share_up * (1 - share_up) / count) ** 0.5


def test_round_stochastically_keeps_infinities_and_quiets_nan() -> None:
    special = as_float(0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFC00001, 0x80000000)
    for start in range(0, 6000, 6):
        rounded = round_stochastically(special, torch.arange(start, start + 6), KEY)
        assert as_pattern(rounded) == [0x7F80, 0xFF80, 0x7FC0, 0x7FC0, 0x7FC0, 0x8000]


def test_round_stochastically_depends_on_key_and_index_alone() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    index = torch.arange(10_000) * 7 + 2**33
    whole = round_stochastically(values, index, KEY)
    assert same_bits(round_stochastically(values, index, KEY), whole)
    assert same_bits(round_stochastically(values[4_000:], index[4_000:], KEY), whole[4_000:])
    others = [(index, rounding_key(0, 3, 8)), (index, rounding_key(0, 4, 7)), (index, rounding_key(1, 3, 7))]
    for other_index, key in [*others, (index + 1, KEY)]:
        share = (round_stochastically(values, other_index, key) != whole).double().mean().item()
        assert share == pytest.approx(1 / 3, abs=0.03)  # the mean of 2 p (1 - p) over all remainders


def test_rounding_key_tells_seed_tensor_and_step_apart() -> None:
    keys = [rounding_key(seed, stream, step) for seed in (0, 1, -1) for stream in (0, 1, 2) for step in (1, 2, 3)]
    assert len(set(keys)) == len(keys)
    assert keys[0] == rounding_key(0, 0, 1)
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_splitmix64_gives_the_published_first_numbers() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    golden = 0x9E3779B97F4A7C15
    assert [splitmix64(golden), splitmix64(2 * golden % 2**64)] == [0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_mix_is_the_finaliser_of_splitmix64_on_tensors() -> None:
    golden = 0x9E3779B97F4A7C15
    states = [0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0]
    mixed = mix(torch.tensor([signed((state + golden) % 2**64) for state in states]))
    assert [value % 2**64 for value in mixed.tolist()] == [splitmix64(state) for state in states]
