"""Choosing exactly K weights by a key: the lowest of one tensor, or of a whole model that is read piece by piece.

Equal keys are put in order by random numbers of the seed and the tensor's name, so that a choice depends on nothing
else: not on threads, nor on the size of the pieces.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import numpy as np
import torch

from subnet_ft.errors import MaskError
from subnet_ft.masks.mask import TensorMask

KeyPieces: TypeAlias = Iterable[tuple[str, np.ndarray]]
"""Tensor names with (n,) integer keys of their next elements; all pieces of a tensor but its last hold 8 * i."""

_DRAWN_BITS = 12  # leading bits of the random number that the histogram of the first pass tells apart
_LARGEST = 0x7FFFFFFF


def generator_of(seed: int, name: str) -> np.random.Generator:
    """Return the random numbers of one tensor.

    Raises:
        MaskError: `seed` is negative.
    """
    if seed < 0:
        raise MaskError(f"`seed` must be >= 0, got {seed}.")
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def magnitude_keys(values: torch.Tensor, *, largest_first: bool = False) -> np.ndarray:
    """Return (N,) uint32 keys in the order of |value|, NaN above all; `largest_first` turns the order round."""
    bits = values.detach().reshape(-1).cpu().float().contiguous().view(torch.int32).numpy()
    keys: np.ndarray = (bits & _LARGEST).view(np.uint32)
    del bits
    if largest_first:
        np.subtract(_LARGEST, keys, out=keys)
    return keys


def lowest(keys: np.ndarray, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Choose `count` of the (N,) `keys`: all below a threshold, and of those that equal it a random part.

    Returns:
        (N,) bool with exactly `count` true.

    Example:
        Of [3, 1, 1, 1] with a count of 2, one of the three pairs of ones.
    """
    if count in (0, keys.size):
        return torch.full((keys.size,), count > 0)
    threshold = np.partition(keys, count - 1)[count - 1]
    chosen = keys < threshold
    tied = np.flatnonzero(keys == threshold)
    order = np.argsort(rng.integers(1 << 32, size=tied.size, dtype=np.uint32), kind="stable")
    chosen[tied[order[: count - int(np.count_nonzero(chosen))]]] = True
    return torch.from_numpy(chosen)


def lowest_overall(
    pieces: Callable[[], KeyPieces],
    shapes: Mapping[str, tuple[int, ...]],
    count: int | Callable[[np.ndarray], int],
    *,
    num_keys: int,
    seed: int,
    purpose: str = "",
) -> dict[str, TensorMask]:
    """Choose the `count` lowest keys of all tensors together, in two passes and the memory of the mask.

    Args:
        pieces: Gives the keys from the start, all tensors in the order of `shapes`; called twice.
        shapes: Shape of every tensor.
        count: How many weights to choose, or what tells it from the (num_keys,) number of weights with each key.
        num_keys: Keys are in [0, num_keys); a few thousand at most.
        seed: Of the random order of equal keys.
        purpose: Choices of one seed for different purposes are independent; a shared order would make them overlap.
    """
    histogram = np.zeros(num_keys << _DRAWN_BITS, dtype=np.int64)
    for _, codes, _ in _coded(pieces(), seed, purpose):
        histogram += np.bincount(codes, minlength=histogram.size)
    if callable(count):
        count = count(histogram.reshape(num_keys, -1).sum(axis=1))
    below = np.cumsum(histogram) - histogram
    threshold = int(np.searchsorted(below, count, side="left")) - 1 if count else -1
    missing = count - int(below[threshold]) if count else 0

    bits = {name: np.zeros((math.prod(shape) + 7) // 8, dtype=np.uint8) for name, shape in shapes.items()}
    done = dict.fromkeys(shapes, 0)
    numbers = {name: number for number, name in enumerate(shapes)}
    tied: list[np.ndarray] = []  # (3, n) each: random number, tensor, position
    for name, codes, draws in _coded(pieces(), seed, purpose):
        start, done[name] = done[name], done[name] + codes.size
        packed = np.packbits(codes < threshold, bitorder="little")
        bits[name][start // 8 : start // 8 + packed.size] = packed
        at = np.flatnonzero(codes == threshold)
        tied.append(np.stack([draws[at].astype(np.int64), np.full(at.size, numbers[name]), at + start]))
    _mark_first(bits, np.concatenate(tied, axis=1) if tied else np.zeros((3, 0), dtype=np.int64), missing)
    return {name: TensorMask.build(torch.from_numpy(bits[name]), shape) for name, shape in shapes.items()}


def tiles(num_elements: int, size: int = 1 << 20) -> Iterable[slice]:
    """Cut a tensor into slices of at most `size` elements, a multiple of 8."""
    for start in range(0, num_elements, size):
        yield slice(start, min(start + size, num_elements))


def _coded(pieces: KeyPieces, seed: int, purpose: str) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
    """Add to every piece its (n,) uint32 random numbers and the codes: the key with their leading bits behind it."""
    current, rng = None, None
    for name, keys in pieces:
        if rng is None or name != current:
            current, rng = name, generator_of(seed, f"{purpose} {name}" if purpose else name)
        draws = rng.integers(1 << 32, size=keys.size, dtype=np.uint32)
        yield name, (keys.astype(np.int64) << _DRAWN_BITS) | (draws >> np.uint32(32 - _DRAWN_BITS)), draws


def _mark_first(bits: dict[str, np.ndarray], tied: np.ndarray, count: int) -> None:
    """Set the bits of the first `count` of (3, n) `tied` by random number, then tensor and position."""
    draws, tensors, positions = tied
    chosen = np.lexsort((positions, tensors, draws))[:count]
    for number, name in enumerate(bits):
        places = positions[chosen[tensors[chosen] == number]]
        np.bitwise_or.at(bits[name], places // 8, np.left_shift(1, places % 8).astype(np.uint8))
