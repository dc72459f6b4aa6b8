"""The additive fingerprint of a tensor."""

from __future__ import annotations

import torch

from subnet_kernels.layout import BitMask
from subnet_kernels.reference.bitmap import unpack_bits
from subnet_kernels.reference.splitmix import mix, signed
from subnet_kernels.reference.views import bits_view

SEEDS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)
_CHUNK = 1 << 16  # small enough that the int64 temporaries stay in cache; whole bytes of a mask
_CHUNK_ON_DEVICE = 1 << 24  # large enough that the wait for each sum does not count


def fingerprint(tensor: torch.Tensor, *, offset: int, outside: BitMask | None) -> tuple[int, int]:
    """Sum the mixes of all elements of `tensor`, or of those outside a mask, under both seeds, modulo 2**64."""
    flat = bits_view(tensor).view(-1)
    sums = [0, 0]
    chunk = _CHUNK if flat.device.type == "cpu" else _CHUNK_ON_DEVICE
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk].to(torch.int64)
        index = torch.arange(offset + start, offset + start + part.numel(), dtype=torch.int64, device=part.device)
        for which, seed in enumerate(SEEDS):
            mixed = mix(mix(index + signed(seed)) + part)
            if outside is not None:
                mixed.masked_fill_(unpack_bits(outside.bits[start // 8 :], part.numel()), 0)
            sums[which] += int(mixed.sum())
    return sums[0] % 2**64, sums[1] % 2**64
