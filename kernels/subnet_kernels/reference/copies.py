"""Copies between the dense layout (N,) and the compact one (K,) of a masked tensor."""

from __future__ import annotations

import torch

from subnet_kernels.layout import BitMask
from subnet_kernels.reference.bitmap import indices
from subnet_kernels.reference.fingerprint import fingerprint


def gather(dense: torch.Tensor, mask: BitMask, *, dtype: torch.dtype) -> torch.Tensor:
    """Copy the masked elements of (N,) into a new (K,)."""
    if mask.is_full:
        return dense.to(dtype, copy=True)
    return dense.index_select(0, indices(mask)).to(dtype)


def scatter(dense: torch.Tensor, mask: BitMask, compact: torch.Tensor) -> None:
    """Write (K,) into the masked elements of (N,), in place."""
    if mask.is_full:
        dense.copy_(compact)
    else:
        dense.index_copy_(0, indices(mask), compact)


def swap(dense: torch.Tensor, mask: BitMask, compact: torch.Tensor) -> None:
    """Exchange (K,) with the masked elements of (N,), in place."""
    masked = gather(dense, mask, dtype=dense.dtype)
    scatter(dense, mask, compact)
    compact.copy_(masked)


def patch(
    dense: torch.Tensor, mask: BitMask, compact: torch.Tensor, *, offset: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Do what `scatter` does; return the fingerprints of (N,) before and after."""
    before = fingerprint(dense, offset=offset, outside=None)
    scatter(dense, mask, compact)
    return before, fingerprint(dense, offset=offset, outside=None)


def compact(dense: torch.Tensor, mask: BitMask, out: torch.Tensor, *, accumulate: bool, scale: float) -> torch.Tensor:
    """Put the masked elements of (N,) times `scale` into (K,) float32 `out`; return the sum of squares of `out`."""
    masked = gather(dense, mask, dtype=torch.float32).mul_(scale)
    if accumulate:
        out.add_(masked)
    else:
        out.copy_(masked)
    wide = torch.float32 if out.device.type == "mps" else torch.float64  # MPS has no float64
    return out.square().sum(dtype=wide)
