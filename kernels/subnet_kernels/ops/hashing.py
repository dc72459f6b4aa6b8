"""The fingerprint of a tensor."""

from __future__ import annotations

import torch

from subnet_kernels.dispatch import choose
from subnet_kernels.layout import BitMask
from subnet_kernels.ops.copies import check_mask


def fingerprint(tensor: torch.Tensor, *, offset: int = 0, outside: BitMask | None = None) -> tuple[int, int]:
    """Sum a 64-bit mix of (flat index, element bits) over a tensor, modulo 2**64, under two seeds.

    The sum adds up over slices: the fingerprint of a tensor is the sum, modulo 2**64, of the fingerprints of its parts,
    each with the offset at which it starts, and so is that of the part outside a mask and the masked rest. It
    identifies a tensor; it does not resist an attacker.

    Args:
        tensor: Any shape, 1-, 2-, 4- or 8-byte dtype; read in C order. In.
        offset: Flat index of the first element, >= 0.
        outside: Leave out the elements of this mask: what is left must never change in masked training.

    Returns:
        Two integers in [0, 2**64).

    Example:
        An empty tensor gives (0, 0); swapping two different elements changes both numbers.

    Source: the mix is the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """
    if offset < 0:
        raise ValueError(f"`offset` must be >= 0, got {offset}")
    if outside is not None:
        check_mask(outside, tensor.numel(), tensor.device)
    sums: tuple[int, int] = choose("fingerprint", tensor.device).function(tensor, offset=offset, outside=outside)
    return sums
