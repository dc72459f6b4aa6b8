"""Packing, counting and comparing bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from subnet_kernels.dispatch import choose
from subnet_kernels.reference import CRITERIA, Comparison


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
    _check_pair(base, tuned)
    result: tuple[torch.Tensor, int] = choose("changed_bits", base.device).function(
        base, tuned, criterion=criterion, tolerance=tolerance
    )
    return result


def compare(
    base: torch.Tensor, tuned: torch.Tensor, *, offset: int = 0, tolerances: Sequence[float] = ()
) -> Comparison:
    """Find in one pass all that an extraction asks of two tensors: changed bits, distances and both fingerprints.

    Args:
        base: (N,) bfloat16, float16 or float32. In.
        tuned: (N,) the same dtype. In.
        offset: Flat index of the first element, as in `fingerprint`, >= 0.
        tolerances: Not negative; for each, the elements with |tuned - base| > tolerance are counted among those whose
            bits differ. Distances are float32; a NaN on one side only is beyond every tolerance, on both within it.

    Returns:
        The bits and count of `changed_bits` by `exact`, a count per tolerance, and both `fingerprint`s.

    Example:
        base [1, 2, 3], tuned [1, 2.5, 2], tolerances [0.1, 0.75]: bits [0b110], count 2, beyond (2, 1).
    """
    _check_pair(base, tuned)
    if base.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"`base` and `tuned` must be bfloat16, float16 or float32, got {base.dtype}")
    if offset < 0:
        raise ValueError(f"`offset` must be >= 0, got {offset}")
    if not all(tolerance >= 0.0 for tolerance in tolerances):
        raise ValueError(f"`tolerances` must be >= 0, got {list(tolerances)}")
    found: Comparison = choose("compare", base.device).function(base, tuned, offset=offset, tolerances=tolerances)
    return found


def _check_pair(base: torch.Tensor, tuned: torch.Tensor) -> None:
    if base.dtype != tuned.dtype or base.shape != tuned.shape or base.dim() != 1:
        raise ValueError(
            "`base` and `tuned` must be flat tensors of one dtype and length, got "
            f"{base.dtype} {tuple(base.shape)} and {tuned.dtype} {tuple(tuned.shape)}"
        )
