"""How far a float32 master must drift before its stored weight changes: half the distance to the nearer neighbour.

A run in bfloat16 with float32 masters moves every master, but a stored weight takes another value only when its master
is nearer to that one. Neighbours lie 2**(exponent - 7) apart in bfloat16, half of that below a power of two, so that
large weights stay and small ones move.
"""

from __future__ import annotations

import numpy as np
import torch

_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
_LEAST_EXPONENT = {torch.bfloat16: 1, torch.float16: 113, torch.float32: 1}  # of normal numbers, biased as in float32
_INFINITE = 255 + 23 - 7 + 1

NUM_REACHES = _INFINITE + 1
"""Keys of `reach_keys` are below this."""


def reach_keys(weights: torch.Tensor) -> np.ndarray:
    """Return (n,) int32 keys in [0, NUM_REACHES) in the order of the drift that changes each of (n,) weights.

    Keys of bfloat16, float16 and float32 weights compare with each other. The last key is that of NaN and infinity.

    Example:
        In bfloat16 1.0078125, 1.5 and -1.9 share the key of a drift of 2**-8, 1.0 that of 2**-9.
    """
    bits = weights.detach().cpu().float().contiguous().view(torch.int32).numpy() & 0x7FFFFFFF
    exponent = np.maximum((bits - 1) >> 23, _LEAST_EXPONENT[weights.dtype])
    keys: np.ndarray = exponent + (23 - _MANTISSA_BITS[weights.dtype])
    keys[bits >= 0x7F800000] = _INFINITE
    return keys


def reach_of(key: int) -> float:
    """Return the drift of a key of `reach_keys`, in units of the weights."""
    return float("inf") if key >= _INFINITE else 2.0 ** (key - 127 - 24)
