"""Random masks of one tensor with the count of a given one: anywhere, in the same bins of |w|, or outside it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

import subnet_kernels
from subnet_ft.errors import MaskError
from subnet_ft.masks.magnitude import NUM_BINS, magnitude_bins
from subnet_ft.masks.mask import TensorMask
from subnet_ft.masks.selection import generator_of, lowest_overall, tiles

_TILE = 1 << 20  # elements drawn at a time
_SEGMENT = 1 << 29  # numpy's hypergeometric draws stop at 10**9; larger tensors are matched segment by segment


def drawn_like(tensor: TensorMask, name: str, seed: int, weight: torch.Tensor | None = None) -> TensorMask:
    """Draw `tensor.count` elements, every one as likely as any other; with `weight`, as many per bin of |weight|.

    Args:
        tensor: The mask to match.
        name: Of the tensor; with the seed it fixes the draw.
        seed: Seed of the draw.
        weight: The tensor's weights, for a draw that is matched on magnitude.
    """
    if tensor.count in (0, tensor.num_elements):
        return tensor
    # Two controls of one seed are two draws: a shared order would make them overlap.
    rng = generator_of(seed, name if weight is None else f"matched {name}")
    flat = None if weight is None else weight.detach().reshape(-1)
    drawn = torch.zeros(tensor.num_elements, dtype=torch.bool)
    chosen = subnet_kernels.unpack_bits(tensor.bits, tensor.num_elements)
    for segment in tiles(tensor.num_elements, _SEGMENT):
        _draw_segment(drawn[segment], chosen[segment], None if flat is None else flat[segment], rng)
    return TensorMask.build(subnet_kernels.pack_bits(drawn), tensor.shape)


def drawn_outside(tensor: TensorMask, name: str, seed: int) -> TensorMask:
    """Draw `tensor.count` elements that are not in `tensor`, every one as likely as any other.

    Raises:
        MaskError: More than half of the tensor is in the mask.
    """
    outside = tensor.num_elements - tensor.count
    if tensor.count > outside:
        raise MaskError(
            f"The mask holds {tensor.count:,} of the {tensor.num_elements:,} weights of `{name}`, so there are only "
            f"{outside:,} outside it, too few for an inverted mask of that size. Use another control, such as "
            "`magnitude_matched`, or a mask whose tensors are at most half dense."
        )
    if not tensor.count:
        return tensor
    bits = tensor.bits.numpy()

    def pieces() -> Iterator[tuple[str, np.ndarray]]:
        for tile in tiles(tensor.num_elements):
            part = bits[tile.start // 8 : (tile.stop + 7) // 8]
            yield name, np.unpackbits(part, count=tile.stop - tile.start, bitorder="little")

    shapes = {name: tensor.shape}
    return lowest_overall(pieces, shapes, tensor.count, num_keys=2, seed=seed, purpose="inverted")[name]


def _draw_segment(
    drawn: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor | None, rng: np.random.Generator
) -> None:
    """Fill (n,) bool `drawn` with a random set that has the bin counts of (n,) bool `chosen`.

    Tile by tile: how many of each bin fall into the tile is hypergeometric in what is left, and which ones is a
    random order inside the bin. Together that is a uniform draw, in memory bounded by the tile.
    """
    parts = list(tiles(drawn.numel(), _TILE))
    population = np.zeros(NUM_BINS, dtype=np.int64)
    wanted = np.zeros(NUM_BINS, dtype=np.int64)
    for tile in parts:
        bins = _bins(weight, tile)
        population += np.bincount(bins, minlength=NUM_BINS)
        wanted += np.bincount(bins[chosen[tile].numpy()], minlength=NUM_BINS)
    for tile in parts:
        bins = _bins(weight, tile)
        here = np.bincount(bins, minlength=NUM_BINS)
        take = rng.hypergeometric(wanted, population - wanted, here)
        order = np.argsort(
            (bins.astype(np.uint64) << np.uint64(48)) | rng.integers(1 << 48, size=bins.size, dtype=np.uint64)
        )
        rank = np.arange(bins.size) - (np.cumsum(here) - here)[bins[order]]
        drawn[tile] = torch.from_numpy(_scattered(order, rank < take[bins[order]]))
        population -= here
        wanted -= take


def _bins(weight: torch.Tensor | None, tile: slice) -> np.ndarray:
    """Return the (n,) bin numbers of a tile: exponent and three mantissa bits of |w|, or all zero."""
    if weight is None:
        return np.zeros(tile.stop - tile.start, dtype=np.int64)
    return magnitude_bins(weight[tile])


def _scattered(order: np.ndarray, values: np.ndarray) -> np.ndarray:
    result = np.empty(order.size, dtype=np.bool_)
    result[order] = values
    return result
