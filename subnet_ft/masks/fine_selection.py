"""Choosing the K weights of a whole model with the highest scores, in the order of float32 and bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import numpy as np
import torch

from subnet_ft.masks.mask import TensorMask
from subnet_ft.masks.selection import KeyPieces, lowest_overall, magnitude_keys

ScorePieces: TypeAlias = Iterable[tuple[str, torch.Tensor]]
"""Tensor names with (n,) float32 scores >= 0 of their next elements; pieces of a tensor but its last hold 8 * i."""

_FINE_BITS = 10  # of the 31 of a non-negative float32; both histograms take a few tens of MiB


def highest_overall(
    pieces: Callable[[], ScorePieces],
    shapes: Mapping[str, tuple[int, ...]],
    count: int | Callable[[np.ndarray, np.ndarray], int],
    *,
    seed: int,
) -> dict[str, TensorMask]:
    """Choose the `count` highest scores of all tensors together, in three passes and the memory of the mask.

    Args:
        pieces: Gives the scores from the start; called three times. A tensor that is left out gets no trainable weight.
        shapes: Shape of every tensor.
        count: How many weights to choose, or what tells it from (B,) scores in falling order and the (B,) number of
            weights with about each of them, to a factor of 1 + 2**-13.
        seed: Of the random order of equal scores.

    Example:
        Of {"a": [0.5, 0.1], "b": [0.3, 0.3]} with a count of 2: the 0.5, and one of the two 0.3.
    """
    histogram = np.zeros(1 << (31 - _FINE_BITS), dtype=np.int64)
    for _, scores in pieces():
        histogram += np.bincount(_keys(scores) >> _FINE_BITS, minlength=histogram.size)
    if callable(count):
        count = count(_coarse_scores(), histogram)
    # The coarse key at which the count is reached; only weights that have it need their finer order.
    coarse = int(np.searchsorted(np.cumsum(histogram), count))

    def refined() -> KeyPieces:
        for name, scores in pieces():
            keys = _keys(scores)
            at = keys >> _FINE_BITS
            fine = (keys & ((1 << _FINE_BITS) - 1)) + 1
            yield name, np.where(at < coarse, 0, np.where(at == coarse, fine, (1 << _FINE_BITS) + 1))

    return lowest_overall(refined, shapes, count, num_keys=(1 << _FINE_BITS) + 2, seed=seed)


def _keys(scores: torch.Tensor) -> np.ndarray:
    """Return (n,) int32 keys, the lowest for the highest score."""
    return magnitude_keys(scores, largest_first=True).view(np.int32)


def _coarse_scores() -> np.ndarray:
    """Return (B,) float32: the lowest score of every coarse key; beyond every number there are none, and zeros here."""
    bits = (0x7FFFFFFF - (np.arange(1, (1 << (31 - _FINE_BITS)) + 1) * (1 << _FINE_BITS) - 1)).astype(np.uint32)
    scores: np.ndarray = bits.view(np.float32)
    return np.where(np.isfinite(scores), scores, 0)
