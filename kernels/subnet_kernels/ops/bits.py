"""Packing, counting and comparing bits."""

from __future__ import annotations

import torch

from subnet_kernels.dispatch import choose
from subnet_kernels.reference import CRITERIA


def pack_bits(dense: torch.Tensor) -> torch.Tensor:
    """Pack booleans into bits, eight to a byte.

    Args:
        dense: (N,) bool. In.

    Returns:
        (ceil(N / 8),) uint8; bit `i` of byte `j` is element `8 * j + i`, padding bits are zero.

    Example:
        [1, 0, 1, 0, 0, 0, 0, 0, 1] packs to [0b00000101, 0b00000001].
    """
    if dense.dtype != torch.bool or dense.dim() != 1:
        raise ValueError(f"`dense` must be a flat bool tensor, got {dense.dtype} of shape {tuple(dense.shape)}")
    packed: torch.Tensor = choose("pack_bits", dense.device).function(dense)
    return packed


def unpack_bits(bits: torch.Tensor, num_elements: int) -> torch.Tensor:
    """Unpack the first `num_elements` bits into booleans; the inverse of `pack_bits`.

    Args:
        bits: (ceil(num_elements / 8),) uint8. In.
        num_elements: N, the number of elements.

    Returns:
        (N,) bool.
    """
    expected = (num_elements + 7) // 8
    if bits.dtype != torch.uint8 or bits.shape != (expected,):
        raise ValueError(
            f"a mask of {num_elements} elements is uint8 of shape ({expected},), got {bits.dtype} {tuple(bits.shape)}"
        )
    dense: torch.Tensor = choose("unpack_bits", bits.device).function(bits, num_elements)
    return dense


def count_bits(bits: torch.Tensor) -> int:
    """Count the bits that are set.

    Args:
        bits: (B,) uint8. In.
    """
    count: int = choose("count_bits", bits.device).function(bits)
    return count


def changed_bits(
    base: torch.Tensor, tuned: torch.Tensor, *, criterion: str = "exact", tolerance: float = 0.0
) -> tuple[torch.Tensor, int]:
    """Mark the elements in which two tensors differ.

    Args:
        base: (N,) any dtype; floating for `absolute` and `relative`. In.
        tuned: (N,) the same dtype. In.
        criterion: `exact`: the bits differ (0.0 and -0.0 do, a NaN and itself do not). `absolute`: |tuned - base| >
            tolerance. `relative`: |tuned - base| > tolerance * |base|. Differences are taken in float32, whatever the
            dtype; a NaN on one side only counts as a change.
        tolerance: Not negative.

    Returns:
        The packed bits (ceil(N / 8),) uint8 and how many are set.

    Example:
        base [1, 2, 3] and tuned [1, 2.5, 3], exact: bits [0b010], count 1.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if not tolerance >= 0.0:
        raise ValueError(f"`tolerance` must be >= 0, got {tolerance}")
    if base.dtype != tuned.dtype or base.shape != tuned.shape or base.dim() != 1:
        raise ValueError(
            "`base` and `tuned` must be flat tensors of one dtype and length, got "
            f"{base.dtype} {tuple(base.shape)} and {tuned.dtype} {tuple(tuned.shape)}"
        )
    result: tuple[torch.Tensor, int] = choose("changed_bits", base.device).function(
        base, tuned, criterion=criterion, tolerance=tolerance
    )
    return result
