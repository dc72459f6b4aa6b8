"""Slots find their elements: every bit of a word, every word of a tile, and 64-bit slots."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from gpu_cases import DEVICE
from helpers import random_bits

from subnet_kernels import pack_bits
from subnet_kernels.gpu.launch import kernel, launch
from subnet_kernels.gpu.slots import (
    SLOTS_PER_PASS,
    TILE_SIZE,
    count_bits,
    find_elements,
    load_words,
    nth_bit,
    pass_slots,
)


@kernel
def words_kernel(
    words_ptr: tl.tensor, ranks_ptr: tl.tensor, counts_ptr: tl.tensor, positions_ptr: tl.tensor, SIZE: tl.constexpr
) -> None:
    lane = tl.arange(0, SIZE)
    word = tl.load(words_ptr + lane).to(tl.uint32, bitcast=True)
    tl.store(counts_ptr + lane, count_bits(word))
    tl.store(positions_ptr + lane, nth_bit(word, tl.load(ranks_ptr + lane)))


@kernel
def elements_kernel(bits_ptr: tl.tensor, elements_ptr: tl.tensor) -> None:
    tile = tl.program_id(0).to(tl.int64)
    words, before, count = load_words(bits_ptr, tile)
    for start in range(0, count, SLOTS_PER_PASS):
        slots = pass_slots(start)
        elements = find_elements(words, before, slots, False)
        tl.store(elements_ptr + tile * TILE_SIZE + slots, elements, mask=slots < count)


def run_words(words: list[int], ranks: list[int]) -> tuple[list[int], list[int]]:
    size = 1 << (len(words) - 1).bit_length()
    signed = torch.tensor(words + [0] * (size - len(words)), dtype=torch.int64).to(torch.int32)
    asked = torch.tensor(ranks + [0] * (size - len(ranks)), dtype=torch.int32)
    counts, positions = torch.full((2, size), -1, dtype=torch.int32, device=DEVICE)
    launch(
        words_kernel, 1, signed.to(DEVICE), asked.to(DEVICE), counts, positions,
        device=DEVICE, is_slotwise=True, SIZE=size,
    )  # fmt: skip
    return counts.tolist()[: len(words)], positions.tolist()[: len(words)]


def test_nth_bit_and_count_bits_give_the_values_of_their_examples() -> None:
    counts, positions = run_words([0b1011, 0b1011, 0b1011], [0, 1, 2])
    assert counts == [3, 3, 3]
    assert positions == [0, 1, 3]


def test_nth_bit_finds_every_bit_of_many_words() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [0xFFFFFFFF, 0x80000000, 0x00010000, 0x0000FFFF, 0xFFFF0000, 0x55555555, 0xAAAAAAAA]
    for density in (0.1, 0.5, 0.9):
        bits = torch.rand(50, 32, generator=generator) < density
        drawn += [sum(1 << bit for bit, is_set in enumerate(row) if is_set) for row in bits.tolist()]
    expected = [(word, rank, bit) for word in drawn for rank, bit in enumerate(b for b in range(32) if word >> b & 1)]
    counts, positions = run_words([word for word, _, _ in expected], [rank for _, rank, _ in expected])
    assert positions == [bit for _, _, bit in expected]
    assert counts == [word.bit_count() for word, _, _ in expected]


@pytest.mark.parametrize("density", [1 / 1024, 0.05, 0.2, 0.5, 0.97, 1.0])
def test_find_elements_lists_the_set_bits_of_every_tile(density: float) -> None:
    chosen = random_bits(3 * 1024, density)
    chosen[1024:1500] = False  # words, and a whole half of a tile, without a bit
    elements = torch.full((3 * 1024,), -1, dtype=torch.int32, device=DEVICE)
    launch(elements_kernel, 3, pack_bits(chosen).to(DEVICE), elements, device=DEVICE, is_slotwise=True)
    for tile, found in enumerate(elements.cpu().view(3, 1024)):
        expected = chosen[tile * 1024 : (tile + 1) * 1024].nonzero().view(-1)
        assert found[: expected.numel()].tolist() == expected.tolist()
        assert (found[expected.numel() :] == -1).all()
