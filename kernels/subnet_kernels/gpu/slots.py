"""Where the masked elements of a tile lie: lanes are compact slots, and each finds its element in the bits.

A tile is 32 words of 32 bits. A lane finds its word by bisecting the words' counts, and the bit inside it by bisecting
partial counts; both stay inside a warp. So only masked elements cost arithmetic, and compact values are contiguous.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from subnet_kernels import layout
from subnet_kernels.gpu.launch import kernel

TILE_SIZE = tl.constexpr(layout.TILE_SIZE)
SEGMENT_TILES = tl.constexpr(layout.SEGMENT_TILES)
WORDS = tl.constexpr(layout.TILE_SIZE // 32)
ROWS = tl.constexpr(4)
SLOTS_PER_PASS = tl.constexpr(4 * layout.TILE_SIZE // 32)


@kernel
def count_bits(words: tl.tensor) -> Any:
    """Count the set bits of every uint32, as int32.

    Example:
        0b1011 has 3.
    """
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@kernel
def nth_bit(word: tl.tensor, rank: tl.tensor) -> Any:
    """Return the position of the set bit of uint32 `word` below which `rank` others are set.

    Example:
        Bit 0 of rank is counted from 0: in 0b1011, rank 2 is bit 3.
    """
    pairs = word - ((word >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    below = ((octets + (octets >> 8)) & 0xFF).to(tl.int32)
    position = tl.where(rank >= below, 16, 0)
    rank = tl.where(rank >= below, rank - below, rank)
    below = ((octets >> position.to(tl.uint32)) & 0xFF).to(tl.int32)
    position = tl.where(rank >= below, position + 8, position)
    rank = tl.where(rank >= below, rank - below, rank)
    below = ((nibbles >> position.to(tl.uint32)) & 0xF).to(tl.int32)
    position = tl.where(rank >= below, position + 4, position)
    rank = tl.where(rank >= below, rank - below, rank)
    below = ((pairs >> position.to(tl.uint32)) & 3).to(tl.int32)
    position = tl.where(rank >= below, position + 2, position)
    rank = tl.where(rank >= below, rank - below, rank)
    below = ((word >> position.to(tl.uint32)) & 1).to(tl.int32)
    return tl.where(rank >= below, position + 1, position)


@kernel
def first_slot(offsets_ptr: tl.tensor, bases_ptr: tl.tensor, tile: tl.tensor) -> Any:
    """Return the int64 compact slot of the first masked element of a tile.

    Example:
        With offsets [0, 2] and bases [0], tile 1 starts at slot 2.
    """
    return tl.load(bases_ptr + tile // SEGMENT_TILES) + tl.load(offsets_ptr + tile)


@kernel
def load_words(bits_ptr: tl.tensor, tile: tl.tensor) -> Any:
    """Load a tile's 32 words; return them and the counts before each, once per row of lanes, and the tile's count.

    Example:
        Words 0b11, 0b1, 0, ... have 0, 2, 3, ... set bits before them and 3 in all.
    """
    words_ptr = bits_ptr.to(tl.pointer_type(tl.uint32)) + tile * WORDS
    count = tl.sum(count_bits(tl.load(words_ptr + tl.arange(0, WORDS))), 0)
    # Every row holds the same words, so that no lane looks for one outside its warp.
    words = tl.load(words_ptr + tl.arange(0, WORDS)[None, :] + tl.zeros([ROWS, 1], tl.int32))
    counts = count_bits(words)
    return words, tl.cumsum(counts, 1) - counts, count


@kernel
def pass_slots(start: tl.tensor) -> Any:
    """Return the (ROWS, 32) slots of the pass that begins at slot `start` of the tile.

    Example:
        The second of 128 slots begins at 128; its lanes have slots 128 to 255.
    """
    return start + tl.arange(0, ROWS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]


@kernel
def find_elements(words: tl.tensor, before: tl.tensor, slots: tl.tensor, IS_FULL: tl.constexpr) -> Any:
    """Return the position in the tile of the masked element of every slot; anything in the tile behind the last one.

    Under a full mask nothing needs to be looked for.

    Example:
        Words 0b11, 0b1, 0, ...: slots 0, 1, 2 are elements 0, 1 and 32.
    """
    elements = slots
    if not IS_FULL:
        word = tl.zeros_like(slots)
        skipped = tl.zeros_like(slots)
        for step in tl.static_range(5):
            probe = word + (16 >> step)
            count = tl.gather(before, probe, 1)
            word = tl.where(count <= slots, probe, word)
            skipped = tl.where(count <= slots, count, skipped)
        elements = word * 32 + nth_bit(tl.gather(words, word, 1), slots - skipped)
    return elements
