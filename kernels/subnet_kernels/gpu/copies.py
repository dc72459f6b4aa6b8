"""Copies between the dense and the compact layout; the bits of a value are moved, never its number."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from subnet_kernels.gpu.launch import kernel_of_slots, launch, whole_tiles
from subnet_kernels.gpu.slots import SLOTS_PER_PASS, TILE_SIZE, find_elements, first_slot, load_words, pass_slots
from subnet_kernels.gpu.values import KINDS, widen
from subnet_kernels.layout import BitMask
from subnet_kernels.reference.views import bits_view


def gather(dense: torch.Tensor, mask: BitMask, *, dtype: torch.dtype) -> torch.Tensor:
    """Copy the masked elements of (N,) into a new (K,)."""
    if mask.is_full:
        return dense.to(dtype, copy=True)
    compact = torch.empty(mask.count, dtype=dtype, device=dense.device)
    kind = None if dtype == dense.dtype else KINDS[dense.dtype]
    _launch(gather_slots, dense, mask, compact, WIDEN_KIND=kind)
    return compact


def scatter(dense: torch.Tensor, mask: BitMask, compact: torch.Tensor) -> None:
    """Write (K,) into the masked elements of (N,), in place."""
    if mask.is_full:
        dense.copy_(compact)
    else:
        _launch(scatter_slots, dense, mask, compact)


def swap(dense: torch.Tensor, mask: BitMask, compact: torch.Tensor) -> None:
    """Exchange (K,) with the masked elements of (N,), in place and without a temporary."""
    _launch(swap_slots, dense, mask, compact, IS_FULL=mask.is_full)


@kernel_of_slots
def gather_slots(
    dense_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    bases_ptr: tl.tensor,
    compact_ptr: tl.tensor,
    WIDEN_KIND: tl.constexpr,
) -> None:
    """Copy the masked elements of one tile into its slots, as they are or widened to float32.

    Example:
        dense [1, 2, 3, 4] under mask 0b1010 gives [2, 4].
    """
    tile = tl.program_id(0).to(tl.int64)
    compact_ptr += first_slot(offsets_ptr, bases_ptr, tile)
    dense_ptr += tile * TILE_SIZE
    words, before, count = load_words(bits_ptr, tile)
    for start in range(0, count, SLOTS_PER_PASS):
        slots = pass_slots(start)
        bits = tl.load(dense_ptr + find_elements(words, before, slots, False), mask=slots < count, other=0)
        if WIDEN_KIND is not None:
            bits = widen(bits, WIDEN_KIND).to(tl.int32, bitcast=True)
        tl.store(compact_ptr + slots, bits, mask=slots < count)


@kernel_of_slots
def scatter_slots(
    dense_ptr: tl.tensor, bits_ptr: tl.tensor, offsets_ptr: tl.tensor, bases_ptr: tl.tensor, compact_ptr: tl.tensor
) -> None:
    """Copy the slots of one tile into its masked elements; the others are neither read nor written.

    Example:
        dense [1, 2, 3, 4], mask 0b1010, compact [8, 9] gives [1, 8, 3, 9].
    """
    tile = tl.program_id(0).to(tl.int64)
    compact_ptr += first_slot(offsets_ptr, bases_ptr, tile)
    dense_ptr += tile * TILE_SIZE
    words, before, count = load_words(bits_ptr, tile)
    for start in range(0, count, SLOTS_PER_PASS):
        slots = pass_slots(start)
        bits = tl.load(compact_ptr + slots, mask=slots < count, other=0)
        tl.store(dense_ptr + find_elements(words, before, slots, False), bits, mask=slots < count)


@kernel_of_slots
def swap_slots(
    dense_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    bases_ptr: tl.tensor,
    compact_ptr: tl.tensor,
    IS_FULL: tl.constexpr,
) -> None:
    """Exchange the slots of one tile with its masked elements; the others are neither read nor written.

    Example:
        dense [1, 2, 3, 4], mask 0b1010, compact [8, 9] gives dense [1, 8, 3, 9] and compact [2, 4].
    """
    tile = tl.program_id(0).to(tl.int64)
    compact_ptr += first_slot(offsets_ptr, bases_ptr, tile)
    dense_ptr += tile * TILE_SIZE
    words, before, count = load_words(bits_ptr, tile)
    for start in range(0, count, SLOTS_PER_PASS):
        slots = pass_slots(start)
        elements = find_elements(words, before, slots, IS_FULL)
        bits = tl.load(compact_ptr + slots, mask=slots < count, other=0)
        masked = tl.load(dense_ptr + elements, mask=slots < count, other=0)
        # Nothing says that one thread loads and stores the same lane: let all load first.
        tl.debug_barrier()
        tl.store(dense_ptr + elements, bits, mask=slots < count)
        tl.store(compact_ptr + slots, masked, mask=slots < count)


def _launch(function: Any, dense: torch.Tensor, mask: BitMask, compact: torch.Tensor, **constants: Any) -> None:
    if mask.count:
        launch(
            function, mask.num_tiles, bits_view(dense), whole_tiles(mask), mask.offsets, mask.bases, bits_view(compact),
            device=dense.device, is_slotwise=True, **constants,
        )  # fmt: skip
