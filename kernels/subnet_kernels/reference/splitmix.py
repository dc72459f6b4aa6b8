"""The finaliser of SplitMix64 (Steele, Lea and Flood 2014), on Python integers and on int64 tensors."""

from __future__ import annotations

import torch

GOLDEN = 0x9E3779B97F4A7C15
"""The increment between two states of SplitMix64."""

MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mix(x: torch.Tensor) -> torch.Tensor:
    """Mix the bits of int64 `x`, read modulo 2**64; a new tensor."""
    # int64 products wrap modulo 2**64, which is what the finaliser asks for.
    x = x ^ _shift_right(x, 30)
    x = x.mul_(signed(MULTIPLIERS[0]))
    x = x.bitwise_xor_(_shift_right(x, 27)).mul_(signed(MULTIPLIERS[1]))
    return x.bitwise_xor_(_shift_right(x, 31))


def splitmix64(x: int) -> int:
    """Return the output of SplitMix64 at state `x`, in [0, 2**64).

    Example:
        splitmix64(0) is 0xE220A8397B1DCDAF, the first number of the published generator with seed 0.
    """
    x = (x + GOLDEN) % 2**64
    x = ((x ^ (x >> 30)) * MULTIPLIERS[0]) % 2**64
    x = ((x ^ (x >> 27)) * MULTIPLIERS[1]) % 2**64
    return x ^ (x >> 31)


def signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit integer."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: torch.Tensor, count: int) -> torch.Tensor:
    # A logical shift: torch has only the arithmetic one for int64.
    return (x >> count).bitwise_and_((1 << (64 - count)) - 1)
