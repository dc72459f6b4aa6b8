"""Compact values under another mask: kept where both masks agree, new elsewhere."""

from __future__ import annotations

import torch

import subnet_kernels
from subnet_kernels import BitMask

# Weights at a time: what is unpacked to booleans stays small whatever the size of the tensor.
_CHUNK = 1 << 22


def remap(values: torch.Tensor, old: BitMask, new: BitMask, into: torch.Tensor) -> torch.Tensor:
    """Overwrite `into` by the values of the weights that both masks hold.

    Args:
        values: (K_old,) compact under `old`. In.
        old: Mask of the same tensor, N weights.
        new: Mask of the same tensor, N weights.
        into: (K_new,) compact under `new`, with what the new weights start from. In-out.

    Returns:
        `into`.

    Example:
        Under [1, 1, 0] the values [5, 6], under [0, 1, 1] into [0, 0]: [6, 0].
    """
    read = written = 0
    for start in range(0, old.num_elements, _CHUNK):
        count = min(_CHUNK, old.num_elements - start)
        before, after = _dense(old, start, count), _dense(new, start, count)
        both = before & after
        num_before, num_after = int(before.sum()), int(after.sum())
        kept = values[read : read + num_before][both[before]]
        into[written : written + num_after][both[after]] = kept
        read, written = read + num_before, written + num_after
    return into


def _dense(mask: BitMask, start: int, count: int) -> torch.Tensor:
    """Return (count,) bool, the mask from element `start` on; `start` is a multiple of 8."""
    return subnet_kernels.unpack_bits(mask.bits[start // 8 : (start + count + 7) // 8], count)
