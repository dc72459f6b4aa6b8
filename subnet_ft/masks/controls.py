"""Control masks: as many weights as the subnetwork in every tensor, chosen without knowing which ones RL changed."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch

import subnet_kernels
from subnet_ft.errors import MaskError
from subnet_ft.masks.magnitude import NUM_BINS, magnitude_bins
from subnet_ft.masks.mask import SubnetMask, TensorMask
from subnet_ft.masks.provenance import Provenance

if TYPE_CHECKING:
    from collections.abc import Iterable

CONTROLS = ("uniform", "magnitude_matched")

_TILE = 1 << 20  # elements drawn at a time
_SEGMENT = 1 << 29  # numpy's hypergeometric draws stop at 10**9; larger tensors are matched segment by segment


def control_mask(
    mask: SubnetMask, kind: str, *, seed: int, weights: Iterable[tuple[str, torch.Tensor]] | None = None
) -> SubnetMask:
    """Draw a random mask of the same size as `mask` in every tensor.

    Args:
        mask: The subnetwork to match.
        kind: `uniform`: any weight of the tensor is as likely as any other. `magnitude_matched`: the same count in
            every bin of |w| (float32 exponent and three leading mantissa bits), uniform inside a bin; bf16 rounding
            lets small weights change in every run, so this is the harder and the fairer control.
        seed: Seed of the draw, with each tensor's name; the same seed gives the same mask.
        weights: The base model's tensors by name, for `magnitude_matched`.

    Raises:
        MaskError: `kind` is unknown, or the weights it needs are missing.
    """
    if kind not in CONTROLS:
        raise MaskError(f"`{kind}` is not a control; choose one of {', '.join(CONTROLS)}.")
    source = {"kind": kind, "seed": seed, "of": mask.fingerprint}
    origin = mask.provenance
    provenance = Provenance(base=origin.base, compare_dtype=origin.compare_dtype, source=source)
    tensors: dict[str, TensorMask] = {}
    if kind == "uniform":
        for name, tensor in mask.tensors.items():
            tensors[name] = _draw(tensor, None, name, seed)
        return SubnetMask(tensors, provenance)
    if weights is None:
        raise MaskError("A magnitude-matched control needs the base model's weights.")
    for name, weight in weights:
        tensors[name] = _draw(mask.tensors[name], weight.detach().reshape(-1), name, seed)
    missing = [name for name in mask.tensors if name not in tensors]
    if missing:
        raise MaskError(f"No weights were given for `{missing[0]}` ({len(missing)} tensors in all).")
    return SubnetMask({name: tensors[name] for name in mask.tensors}, provenance)


def _draw(tensor: TensorMask, weight: torch.Tensor | None, name: str, seed: int) -> TensorMask:
    """Draw `tensor.count` elements; per bin of |weight| as many as `tensor` has there."""
    if tensor.count in (0, tensor.num_elements):
        return tensor
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    drawn = torch.zeros(tensor.num_elements, dtype=torch.bool)
    chosen = subnet_kernels.unpack_bits(tensor.bits, tensor.num_elements)
    for start in range(0, tensor.num_elements, _SEGMENT):
        segment = slice(start, min(start + _SEGMENT, tensor.num_elements))
        _draw_segment(drawn[segment], chosen[segment], None if weight is None else weight[segment], rng)
    return TensorMask.build(subnet_kernels.pack_bits(drawn), tensor.shape)


def _draw_segment(
    drawn: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor | None, rng: np.random.Generator
) -> None:
    """Fill (n,) bool `drawn` with a random set that has the bin counts of (n,) bool `chosen`.

    Tile by tile: how many of each bin fall into the tile is hypergeometric in what is left, and which ones is a
    random order inside the bin. Together that is a uniform draw, in memory bounded by the tile.
    """
    tiles = [slice(start, min(start + _TILE, drawn.numel())) for start in range(0, drawn.numel(), _TILE)]
    population = np.zeros(NUM_BINS, dtype=np.int64)
    wanted = np.zeros(NUM_BINS, dtype=np.int64)
    for tile in tiles:
        bins = _bins(weight, tile)
        population += np.bincount(bins, minlength=NUM_BINS)
        wanted += np.bincount(bins[chosen[tile].numpy()], minlength=NUM_BINS)
    for tile in tiles:
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
