"""The additive fingerprint of a tensor."""

from __future__ import annotations

import torch
import triton.language as tl

from subnet_kernels.gpu.launch import kernel_of_tiles, launch, whole_tiles
from subnet_kernels.gpu.slots import TILE_SIZE
from subnet_kernels.gpu.values import mix
from subnet_kernels.layout import TILE_SIZE as TILE
from subnet_kernels.layout import BitMask
from subnet_kernels.reference.fingerprint import SEEDS
from subnet_kernels.reference.views import bits_view

_SEED_1 = tl.constexpr(SEEDS[0])
_SEED_2 = tl.constexpr(SEEDS[1])


def fingerprint(tensor: torch.Tensor, *, offset: int, outside: BitMask | None) -> tuple[int, int]:
    """Sum the mixes of all elements of `tensor`, or of those outside a mask, under both seeds, modulo 2**64."""
    flat = bits_view(tensor).view(-1)
    whole, tiles = flat.numel() // TILE, -(-flat.numel() // TILE)
    partials = torch.empty((tiles, 2), dtype=torch.int64, device=flat.device)
    # Without a mask the kernel never reads its bits; it only needs some address there.
    bits = flat if outside is None else whole_tiles(outside).view(torch.int32)
    for first, last, is_partial in ((0, whole, False), (whole, tiles, True)):
        launch(
            fingerprint_tile, last - first, flat, bits, partials, flat.numel(), offset, first,
            device=flat.device, is_slotwise=False, HAS_MASK=outside is not None, IS_PARTIAL=is_partial,
        )  # fmt: skip
    # int64 sums wrap modulo 2**64, in any order to the same value.
    first_sum, second_sum = partials.sum(dim=0).tolist()
    return first_sum % 2**64, second_sum % 2**64


@kernel_of_tiles
def fingerprint_tile(
    flat_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    num_elements: tl.tensor,
    offset: tl.tensor,
    first_tile: tl.tensor,
    HAS_MASK: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
) -> None:
    """Sum the mixes of one tile's elements under both seeds.

    Example:
        Elements outside the tensor or inside the mask add nothing: a tile whose mask is full gives (0, 0).
    """
    tile = tl.program_id(0).to(tl.int64) + first_tile
    position = tl.arange(0, TILE_SIZE)
    counts = position >= 0
    if IS_PARTIAL:
        counts = position < num_elements - tile * TILE_SIZE
        values = tl.load(flat_ptr + tile * TILE_SIZE + position, mask=counts, other=0)
    else:
        values = tl.load(flat_ptr + tile * TILE_SIZE + position)
    if HAS_MASK:
        words = tl.load(bits_ptr + tile * (TILE_SIZE // 32) + position // 32)
        counts = counts & ((words >> (position % 32)) & 1 == 0)
    # Signed values are widened with their sign, as in the reference.
    values = values.to(tl.int64).to(tl.uint64)
    index = (offset + tile * TILE_SIZE + position).to(tl.uint64)
    first = tl.where(counts, mix(mix(index + _SEED_1) + values).to(tl.int64), 0)
    second = tl.where(counts, mix(mix(index + _SEED_2) + values).to(tl.int64), 0)
    tl.store(partials_ptr + 2 * tile, tl.sum(first, 0))
    tl.store(partials_ptr + 2 * tile + 1, tl.sum(second, 0))
