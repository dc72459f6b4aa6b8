"""float32 masters beside bfloat16 weights: one rounding rule, and a split of a master that loses nothing.

Ties round away from zero. Round-to-even cannot be split: 0x3F808000 and 0x3F7F8000 would share both halves.
"""

from __future__ import annotations

import torch

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


def _upper_half(bits: torch.Tensor, is_nan: torch.Tensor) -> torch.Tensor:
    # Adding the half overflows int32 for some NaNs only, and those are replaced.
    return ((bits + _HALF) >> 16).masked_fill_(is_nan, _QUIET_NAN).to(torch.int16)
