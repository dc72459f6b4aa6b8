"""Conversions in kernels against the reference's, on the bits that are hard."""

from __future__ import annotations

import torch
import triton.language as tl
from gpu_cases import DEVICE
from helpers import same_bits

from subnet_kernels import join_master, round_to_bfloat16, rounding_key, split_master
from subnet_kernels.gpu.launch import kernel, launch
from subnet_kernels.gpu.values import join, mix, narrow, round_stochastically, split, widen
from subnet_kernels.reference import round_stochastically as reference_stochastically
from subnet_kernels.reference.splitmix import GOLDEN, signed, splitmix64

PATTERNS = (
    0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000,
    0x80000000, 0x00000000, 0x00008000, 0x80008000, 0x3F7F8000, 0x7F7F8000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001,
)  # fmt: skip


@kernel
def convert_kernel(
    values_ptr: tl.tensor, key_ptr: tl.tensor, out_ptr: tl.tensor, upper_ptr: tl.tensor, remainder_ptr: tl.tensor,
    joined_ptr: tl.tensor, stochastic_ptr: tl.tensor, KIND: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    lane = tl.arange(0, SIZE)
    value = tl.load(values_ptr + lane)
    tl.store(out_ptr + lane, narrow(value, KIND))
    upper, remainder = split(value)
    tl.store(upper_ptr + lane, upper)
    tl.store(remainder_ptr + lane, remainder)
    tl.store(joined_ptr + lane, join(upper, remainder))
    key = tl.load(key_ptr).to(tl.uint64)
    tl.store(stochastic_ptr + lane, round_stochastically(value, lane.to(tl.uint64) + (1 << 40), key))


@kernel
def widen_kernel(bits_ptr: tl.tensor, out_ptr: tl.tensor, KIND: tl.constexpr, SIZE: tl.constexpr) -> None:
    lane = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + lane, widen(tl.load(bits_ptr + lane), KIND))


@kernel
def mix_kernel(states_ptr: tl.tensor, out_ptr: tl.tensor, SIZE: tl.constexpr) -> None:
    lane = tl.arange(0, SIZE)
    tl.store(out_ptr + lane, mix(tl.load(states_ptr + lane).to(tl.uint64)).to(tl.int64))


def hard_values(size: int = 4096) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (size,), generator=generator).to(torch.int32)
    bits[: len(PATTERNS)] = torch.tensor(PATTERNS, dtype=torch.int64).to(torch.int32)
    # A third lies half way between two bfloat16, and one step to either side.
    bits[size // 3 : 2 * size // 3] = bits[size // 3 : 2 * size // 3] & -0x10000 | 0x8000
    bits[size // 2 : 2 * size // 3] += torch.randint(-1, 2, (2 * size // 3 - size // 2,), generator=generator).int()
    return bits.view(torch.float32)


def convert(kind: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    values = hard_values()
    key = rounding_key(5, 3, 11)
    shorts = [torch.empty(values.numel(), dtype=torch.int16, device=DEVICE) for _ in range(4)]
    joined = torch.full(values.shape, float("nan"), device=DEVICE)
    launch(
        convert_kernel, 1, values.to(DEVICE), torch.tensor([key]).to(DEVICE), *shorts[:3], joined, shorts[3],
        device=DEVICE, is_slotwise=False, KIND=kind, SIZE=values.numel(),
    )  # fmt: skip
    index = torch.arange(values.numel()) + (1 << 40)
    drawn = reference_stochastically(values, index, key).view(torch.int16)
    assert torch.equal(shorts[3].cpu(), drawn)
    return values, [shorts[0].cpu(), shorts[1].cpu(), shorts[2].cpu(), joined.cpu()]


def test_narrow_split_and_join_follow_the_reference_on_ties_and_nan() -> None:
    values, (narrowed, upper, remainder, joined) = convert("bfloat16")
    assert torch.equal(narrowed, round_to_bfloat16(values).view(torch.int16))
    expected_upper, expected_remainder = split_master(values)
    assert torch.equal(upper, expected_upper.view(torch.int16))
    assert torch.equal(remainder, expected_remainder)
    assert same_bits(joined, join_master(expected_upper, expected_remainder))
    assert (narrowed[:1] & 0xFFFF).tolist() == [0x3F81]


def test_narrow_rounds_to_the_nearest_float16_and_ties_to_even() -> None:
    halves = torch.arange(0x3C00, 0x3C00 + 2048, dtype=torch.int16).view(torch.float16).float()
    ties = torch.stack([halves, (halves + torch.cat([halves[1:], halves[-1:]])) / 2], dim=1).view(-1)
    out = torch.empty(ties.numel(), dtype=torch.int16, device=DEVICE)
    shorts = [torch.empty_like(out) for _ in range(3)]
    launch(
        convert_kernel, 1, ties.to(DEVICE), torch.tensor([0]).to(DEVICE), out, *shorts[:2], torch.empty_like(ties),
        shorts[2], device=DEVICE, is_slotwise=False, KIND="float16", SIZE=ties.numel(),
    )  # fmt: skip
    assert torch.equal(out.cpu(), ties.half().view(torch.int16))


def test_widen_reads_every_bfloat16_and_every_number_of_float16() -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for kind, dtype in {"bfloat16": torch.bfloat16, "float16": torch.float16}.items():
        out = torch.full(bits.shape, float("nan"), device=DEVICE)
        launch(widen_kernel, 64, bits.to(DEVICE), out, device=DEVICE, is_slotwise=False, KIND=kind, SIZE=1024)
        expected = bits.view(dtype).float()
        numbers = torch.ones_like(bits, dtype=torch.bool) if dtype == torch.bfloat16 else ~expected.isnan()
        assert same_bits(out.cpu()[numbers], expected[numbers])
        assert out.cpu()[~numbers].isnan().all()


def test_mix_gives_the_published_numbers() -> None:
    states = torch.tensor([signed((GOLDEN * k) % 2**64) for k in range(1, 9)])
    out = torch.zeros_like(states, device=DEVICE)
    launch(mix_kernel, 1, states.to(DEVICE), out, device=DEVICE, is_slotwise=False, SIZE=8)
    assert out[0].item() % 2**64 == 0xE220A8397B1DCDAF
    assert [value % 2**64 for value in out.tolist()] == [splitmix64((GOLDEN * k) % 2**64) for k in range(8)]
