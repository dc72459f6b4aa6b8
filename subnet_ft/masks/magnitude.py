"""Bins of |w|: what the magnitude-matched control and the magnitude-matched null hold equal."""

from __future__ import annotations

import numpy as np
import torch

NUM_BINS = 1 << 11
"""Eight bits of exponent and three of mantissa."""


def magnitude_bins(weights: torch.Tensor) -> np.ndarray:
    """Return the (n,) int16 bin numbers, below `NUM_BINS`, of (n,) weights of any floating dtype.

    A bin is the float32 exponent and the three leading mantissa bits of |w|: eight bins for every doubling.

    Example:
        1.0 and 1.1 share bin 1016, 1.125 is in 1017 and -2.0 in 1024.
    """
    flat = weights.detach().cpu().contiguous()
    if flat.dtype == torch.bfloat16:  # the upper half of a float32
        return (flat.view(torch.int16).numpy() & 0x7FFF) >> 4
    return ((flat.float().view(torch.int32).numpy() & 0x7FFFFFFF) >> 20).astype(np.int16)
