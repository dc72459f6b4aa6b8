"""Bits of a mask: packing, counting and positions."""

from __future__ import annotations

import numpy as np
import torch

from subnet_kernels.layout import BitMask

_SHIFTS = torch.arange(8, dtype=torch.uint8)


def pack_bits(dense: torch.Tensor) -> torch.Tensor:
    """Pack (N,) bool into (ceil(N / 8),) uint8."""
    if dense.device.type != "cpu":
        return _pack_with_torch(dense)
    return torch.from_numpy(np.packbits(dense.contiguous().view(torch.uint8).numpy(), bitorder="little"))


def unpack_bits(bits: torch.Tensor, num_elements: int) -> torch.Tensor:
    """Unpack (ceil(N / 8),) uint8 into (N,) bool."""
    if bits.device.type != "cpu":
        return _unpack_with_torch(bits, num_elements)
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=num_elements, bitorder="little")).view(torch.bool)


def count_bits(bits: torch.Tensor) -> int:
    """Count the set bits of (B,) uint8."""
    return int(np.bitwise_count(bits.cpu().numpy()).sum(dtype=np.int64))


def indices(mask: BitMask) -> torch.Tensor:
    """Return the (K,) int64 sorted flat indices of the set bits."""
    unpacked = unpack_bits(mask.bits, mask.num_elements)
    if mask.device.type != "cpu":
        return unpacked.nonzero().view(-1)
    return torch.from_numpy(np.flatnonzero(unpacked.numpy()))


def _pack_with_torch(dense: torch.Tensor) -> torch.Tensor:
    """Do what numpy does in `pack_bits`, on any device."""
    padded = torch.nn.functional.pad(dense.to(torch.uint8), (0, -dense.numel() % 8))
    return (padded.view(-1, 8) << _SHIFTS.to(dense.device)).sum(dim=1, dtype=torch.uint8)


def _unpack_with_torch(bits: torch.Tensor, num_elements: int) -> torch.Tensor:
    """Do what numpy does in `unpack_bits`, on any device."""
    unpacked = (bits.unsqueeze(-1) >> _SHIFTS.to(bits.device)) & 1
    return unpacked.view(-1)[:num_elements].to(torch.bool)
