"""A part of a tensor's mask: the bits of a range of its flat elements."""

from __future__ import annotations

import torch

import subnet_kernels


def slice_bits(bits: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Return the mask of `count` flat elements from `start` on.

    Args:
        bits: (ceil(N / 8),) uint8, the mask of a tensor of N elements, in C order.
        start: First element, in [0, N].
        count: Number of elements, with `start + count` <= N.

    Returns:
        (ceil(count / 8),) uint8 with zero padding; it shares nothing with `bits`.

    Example:
        Of 0b10110000 (elements 4, 5 and 7), the 3 elements from 5 on are 0b101.
    """
    if start < 0 or count < 0 or (start + count + 7) // 8 > bits.numel():
        raise ValueError(f"elements {start} to {start + count} lie outside a mask of {bits.numel()} bytes")
    first, shift, size = start // 8, start % 8, (count + 7) // 8
    part = bits[first : first + size].clone()
    if shift:
        part >>= shift
        following = bits[first + 1 : first + 1 + size]
        part[: following.numel()] |= following << (8 - shift)
    if count % 8:
        part[-1] &= (1 << count % 8) - 1
    return part


def count_before(bits: torch.Tensor, start: int) -> int:
    """Return how many of the elements before `start` are trainable: where the compact values of a part begin."""
    return subnet_kernels.count_bits(slice_bits(bits, 0, start))
