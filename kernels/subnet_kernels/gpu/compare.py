"""Which elements of two tensors differ, packed into bits."""

from __future__ import annotations

import torch
import triton.language as tl

from subnet_kernels.gpu.launch import kernel_of_tiles, launch
from subnet_kernels.gpu.slots import TILE_SIZE
from subnet_kernels.gpu.values import KINDS, widen
from subnet_kernels.layout import TILE_SIZE as TILE
from subnet_kernels.reference.views import bits_view

_TILE_BYTES = tl.constexpr(TILE // 8)


def changed_bits(
    base: torch.Tensor, tuned: torch.Tensor, *, criterion: str, tolerance: float
) -> tuple[torch.Tensor, int]:
    """Return the packed bits of the changed elements of two (N,) tensors, and their count."""
    if criterion != "exact" and base.dtype not in KINDS:
        base, tuned = base.float(), tuned.float()
    num_elements, device = base.numel(), base.device
    whole, tiles = num_elements // TILE, -(-num_elements // TILE)
    bits = torch.empty(tiles * TILE // 8, dtype=torch.uint8, device=device)
    counts = torch.empty(tiles, dtype=torch.int32, device=device)
    arguments = (bits_view(base), bits_view(tuned), bits, counts, num_elements, float(tolerance))
    constants = {"CRITERION": criterion, "KIND": KINDS.get(base.dtype)}
    for first, last, is_partial in ((0, whole, False), (whole, tiles, True)):
        launch(
            compare_tile, last - first, *arguments, first,
            device=device, is_slotwise=False, IS_PARTIAL=is_partial, **constants,
        )  # fmt: skip
    # The tail of the last tile is zero; whoever uses the bits expects whole bytes of the tensor and no more.
    return bits[: (num_elements + 7) // 8].clone(), int(counts.sum())


@kernel_of_tiles
def compare_tile(
    base_ptr: tl.tensor,
    tuned_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_elements: tl.tensor,
    tolerance: tl.tensor,
    first_tile: tl.tensor,
    CRITERION: tl.constexpr,
    KIND: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
) -> None:
    """Pack which elements of one tile differ, and count them.

    Example:
        base [1, 2, 3] and tuned [1, 2.5, 3], exact: byte 0b010, count 1.
    """
    tile = tl.program_id(0).to(tl.int64) + first_tile
    position = tl.arange(0, _TILE_BYTES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    base_ptr += tile * TILE_SIZE
    tuned_ptr += tile * TILE_SIZE
    if IS_PARTIAL:
        is_inside = position < num_elements - tile * TILE_SIZE
        base = tl.load(base_ptr + position, mask=is_inside, other=0)
        tuned = tl.load(tuned_ptr + position, mask=is_inside, other=0)
    else:
        base = tl.load(base_ptr + position)
        tuned = tl.load(tuned_ptr + position)
    if CRITERION == "exact":
        changed = base != tuned
    else:
        old = widen(base, KIND)
        new = widen(tuned, KIND)
        threshold = tl.abs(old) * tolerance if CRITERION == "relative" else tl.zeros_like(old) + tolerance
        # Equal infinities differ by NaN, and so does a NaN on one side: only the second is a change.
        is_unequal = (old != new) & ((old == old) | (new == new))
        changed = is_unequal & ((tl.abs(new - old) <= threshold) == 0)
    packed = tl.sum(changed.to(tl.int32) << tl.arange(0, 8)[None, :], 1)
    tl.store(bits_ptr + tile * _TILE_BYTES + tl.arange(0, _TILE_BYTES), packed.to(tl.uint8))
    tl.store(counts_ptr + tile, tl.sum(tl.sum(changed.to(tl.int32), 1), 0))
