"""Compaction of a dense gradient, with the sum of squares in the same pass."""

from __future__ import annotations

import torch
import triton.language as tl

from subnet_kernels.gpu.launch import kernel_of_slots, launch, whole_tiles
from subnet_kernels.gpu.slots import (
    ROWS,
    SLOTS_PER_PASS,
    TILE_SIZE,
    WORDS,
    find_elements,
    first_slot,
    load_words,
    pass_slots,
)
from subnet_kernels.gpu.values import KINDS, widen
from subnet_kernels.layout import BitMask
from subnet_kernels.reference.views import bits_view


def compact(dense: torch.Tensor, mask: BitMask, out: torch.Tensor, *, accumulate: bool, scale: float) -> torch.Tensor:
    """Put the masked elements of (N,) times `scale` into (K,) float32 `out`; return the sum of squares of `out`.

    Every tile sums its own squares, and the tiles are summed in one order: the same bits every time, without atomics.
    """
    partials = torch.zeros(mask.num_tiles, dtype=torch.float64, device=dense.device)
    if mask.count:
        launch(
            compact_slots, mask.num_tiles, bits_view(dense), whole_tiles(mask), mask.offsets, mask.bases, out,
            partials, float(scale), device=dense.device, is_slotwise=True,
            KIND=KINDS[dense.dtype], ACCUMULATE=accumulate, IS_FULL=mask.is_full,
        )  # fmt: skip
    return partials.sum()


@kernel_of_slots
def compact_slots(
    dense_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    bases_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    scale: tl.tensor,
    KIND: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    IS_FULL: tl.constexpr,
) -> None:
    """Put the scaled masked elements of one tile into its slots and the sum of their squares into `partials`.

    Example:
        dense [1, 2, 3, 4], mask 0b1010, out [1, 1], accumulate, scale 2 gives out [5, 9] and the partial sum 106.
    """
    tile = tl.program_id(0).to(tl.int64)
    out_ptr += first_slot(offsets_ptr, bases_ptr, tile)
    dense_ptr += tile * TILE_SIZE
    words, before, count = load_words(bits_ptr, tile)
    # A lane adds at most eight squares in float32, as each is rounded; the rest of the sum is float64.
    squares = tl.zeros([ROWS, WORDS], tl.float32)
    for start in range(0, count, SLOTS_PER_PASS):
        slots = pass_slots(start)
        bits = tl.load(dense_ptr + find_elements(words, before, slots, IS_FULL), mask=slots < count, other=0)
        values = widen(bits, KIND) * scale
        if ACCUMULATE:
            values = tl.load(out_ptr + slots, mask=slots < count, other=0.0) + values
        tl.store(out_ptr + slots, values, mask=slots < count)
        squares += values * values  # zero in idle lanes
    tl.store(partials_ptr + tile, tl.sum(tl.sum(squares.to(tl.float64), 1), 0))
