"""Bits of a mask: packing, counting, and the copies between dense and compact layouts."""

from __future__ import annotations

import numpy as np
import torch

_POPCOUNT = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


def pack_bits(dense: torch.Tensor) -> torch.Tensor:
    """Pack (N,) bool into (ceil(N / 8),) uint8."""
    packed = np.packbits(dense.cpu().contiguous().view(torch.uint8).numpy(), bitorder="little")
    return torch.from_numpy(packed).to(dense.device)


def unpack_bits(bits: torch.Tensor, num_elements: int) -> torch.Tensor:
    """Unpack (ceil(N / 8),) uint8 into (N,) bool."""
    unpacked = np.unpackbits(bits.cpu().numpy(), count=num_elements, bitorder="little")
    return torch.from_numpy(unpacked).view(torch.bool).to(bits.device)


def count_bits(bits: torch.Tensor) -> int:
    """Count the set bits of (B,) uint8."""
    return int(_POPCOUNT[bits.cpu().numpy()].sum(dtype=np.int64))


def indices(bits: torch.Tensor, num_elements: int) -> torch.Tensor:
    """Return the (K,) int64 sorted flat indices of the set bits."""
    unpacked = np.unpackbits(bits.cpu().numpy(), count=num_elements, bitorder="little").view(np.bool_)
    return torch.from_numpy(np.flatnonzero(unpacked)).to(bits.device)


def gather(dense: torch.Tensor, bits: torch.Tensor, count: int, *, dtype: torch.dtype) -> torch.Tensor:
    """Copy the masked elements of (N,) into a new (K,)."""
    if count == dense.numel():
        return dense.to(dtype, copy=True)
    return dense.index_select(0, indices(bits, dense.numel())).to(dtype)


def scatter(dense: torch.Tensor, bits: torch.Tensor, compact: torch.Tensor) -> None:
    """Write (K,) into the masked elements of (N,), in place."""
    if compact.numel() == dense.numel():
        dense.copy_(compact)
    else:
        dense.index_copy_(0, indices(bits, dense.numel()), compact)
