"""float32 masters beside bfloat16 weights: one rounding rule, and a split of a master that loses nothing.

Ties round away from zero. Round-to-even cannot be split: 0x3F808000 and 0x3F7F8000 would share both halves.
"""

from __future__ import annotations

import torch

from subnet_kernels.reference.splitmix import GOLDEN, mix, signed, splitmix64

_HALF = 0x8000
_QUIET_NAN = 0x7FC0


def round_to_bfloat16(master: torch.Tensor) -> torch.Tensor:
    """Round float32 to bfloat16, ties away from zero; every NaN becomes the quiet one.

    Args:
        master: Any shape, float32. In.

    Returns:
        The same shape, bfloat16.

    Example:
        0x3F808000, half way between 0x3F80 and 0x3F81, becomes 0x3F81.
    """
    return _upper_half(master.view(torch.int32), master.isnan()).view(torch.bfloat16)


def round_to_weights(master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 masters to a weight dtype: `round_to_bfloat16`, or to the nearest float16, ties to even.

    Args:
        master: Any shape, float32. In.
        dtype: bfloat16, float16 or float32.
    """
    return round_to_bfloat16(master) if dtype == torch.bfloat16 else master.to(dtype)


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split (K,) float32 into the rounded (K,) bfloat16 weight and the (K,) int16 remainder that restores it."""
    bits = master.view(torch.int32)
    upper = _upper_half(bits, master.isnan())
    remainder = (bits - (upper.to(torch.int32) << 16)).masked_fill(master.isnan(), 0).to(torch.int16)
    return upper.view(torch.bfloat16), remainder


def join_master(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Restore the (K,) float32 master from its (K,) bfloat16 weight and (K,) int16 remainder."""
    upper = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    return (upper + remainder.to(torch.int32)).view(torch.float32)


def rounding_key(seed: int, stream: int, step: int) -> int:
    """Return the 64-bit key of the random bits of one tensor in one step, as a signed integer.

    Args:
        seed: Any integer; the same on every replica.
        stream: Number of the tensor, >= 0.
        step: Number of the update, >= 1.

    Example:
        Another seed, another tensor or another step gives another key; the same three give the same one.
    """
    return signed(splitmix64(splitmix64(splitmix64(seed % 2**64) + stream) + step))


def round_stochastically(values: torch.Tensor, index: torch.Tensor, key: int) -> torch.Tensor:
    """Round (K,) float32 to (K,) bfloat16, up or down with the probability that makes the mean exact.

    The random bits of an element depend on the key and its flat index alone, so replicas draw the same ones. An
    infinity stays; every NaN becomes the quiet one.

    Args:
        values: (K,) float32. In.
        index: (K,) int64 flat index of every element in its dense tensor. In.
        key: What `rounding_key` returns.

    Source: the generator is SplitMix64 (Steele, Lea and Flood 2014), read at position `index`.
    """
    random = (mix((index + 1) * signed(GOLDEN) + key) >> 48) & 0xFFFF
    bits = (values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + random
    upper = (bits >> 16) & 0xFFFF
    # torch casts to int16 modulo 2**16 only from int32 values that fit; bring the upper half into range first.
    upper = torch.where(upper >= 0x8000, upper - 0x10000, upper).masked_fill_(values.isnan(), _QUIET_NAN)
    return upper.to(torch.int16).view(torch.bfloat16)


def _upper_half(bits: torch.Tensor, is_nan: torch.Tensor) -> torch.Tensor:
    # Adding the half overflows int32 for some NaNs only, and those are replaced.
    return ((bits + _HALF) >> 16).masked_fill_(is_nan, _QUIET_NAN).to(torch.int16)
