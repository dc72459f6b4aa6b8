"""The additive fingerprint of a tensor."""

from __future__ import annotations

import torch

from subnet_kernels.reference.views import bits_view

_SEEDS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_CHUNK = 1 << 16  # small enough that the int64 temporaries stay in cache
_CHUNK_ON_DEVICE = 1 << 24  # large enough that the wait for each sum does not count


def fingerprint(tensor: torch.Tensor, *, offset: int) -> tuple[int, int]:
    """Sum the mixes of all elements of `tensor`, under both seeds, modulo 2**64."""
    flat = bits_view(tensor).view(-1)
    sums = [0, 0]
    chunk = _CHUNK if flat.device.type == "cpu" else _CHUNK_ON_DEVICE
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk].to(torch.int64)
        index = torch.arange(offset + start, offset + start + part.numel(), dtype=torch.int64, device=part.device)
        for which, seed in enumerate(_SEEDS):
            mixed = _mix(_mix(index + _signed(seed)) + part)
            sums[which] += int(mixed.sum())
    return sums[0] % 2**64, sums[1] % 2**64


def _mix(x: torch.Tensor) -> torch.Tensor:
    # int64 products wrap modulo 2**64, which is what the finaliser asks for.
    x = x ^ _shift_right(x, 30)
    x = x.mul_(_signed(_MULTIPLIERS[0]))
    x = x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(_MULTIPLIERS[1]))
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: torch.Tensor, count: int) -> torch.Tensor:
    # A logical shift: torch has only the arithmetic one for int64.
    return (x >> count).bitwise_and_((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
