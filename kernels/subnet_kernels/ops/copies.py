"""Copies between the dense and the compact layout."""

from __future__ import annotations

import torch

from subnet_kernels.dispatch import choose
from subnet_kernels.layout import BitMask


def gather(dense: torch.Tensor, mask: BitMask, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Copy the masked elements of a dense tensor into a new compact one.

    Args:
        dense: (N,) bfloat16, float16 or float32, contiguous. In.
        mask: Bits of N elements, K of them set. In.
        dtype: Of the result: float32, or the dtype of `dense`.

    Returns:
        (K,) `dtype`.

    Example:
        dense [1, 2, 3, 4] under mask 0b1010 gives [2, 4].
    """
    check_mask(mask, dense.numel(), dense.device)
    _check_flat(dense, "dense", "what is read are elements, in the order of memory")
    if dtype not in (torch.float32, dense.dtype):
        raise ValueError(f"`dtype` must be torch.float32 or that of `dense`, {dense.dtype}, got {dtype}")
    compact_values: torch.Tensor = choose("gather", dense.device).function(dense, mask, dtype=dtype)
    return compact_values


def scatter(dense: torch.Tensor, mask: BitMask, compact: torch.Tensor) -> None:
    """Write compact values into the masked elements; every other element keeps its bits.

    Args:
        dense: (N,) bfloat16, float16 or float32, contiguous. In-out.
        mask: Bits of N elements, K of them set. In.
        compact: (K,) the dtype of `dense`; no rounding happens here. In.

    Example:
        dense [1, 2, 3, 4], mask 0b1010, compact [8, 9] gives [1, 8, 3, 9].
    """
    _check_pair(dense, mask, compact)
    choose("scatter", dense.device).function(dense, mask, compact)


def swap(dense: torch.Tensor, mask: BitMask, compact: torch.Tensor) -> None:
    """Exchange compact values with the masked elements; every other element keeps its bits. Twice is nothing.

    Args:
        dense: (N,) bfloat16, float16 or float32, contiguous. In-out.
        mask: Bits of N elements, K of them set. In.
        compact: (K,) the dtype of `dense`, contiguous. In-out.

    Example:
        dense [1, 2, 3, 4], mask 0b1010, compact [8, 9] gives dense [1, 8, 3, 9] and compact [2, 4].
    """
    _check_pair(dense, mask, compact)
    choose("swap", dense.device).function(dense, mask, compact)


def patch(
    dense: torch.Tensor, mask: BitMask, compact: torch.Tensor, *, offset: int = 0
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Write compact values into the masked elements, in one pass with the fingerprints before and after.

    Args:
        dense: (N,) bfloat16, float16 or float32, contiguous. In-out.
        mask: Bits of N elements, K of them set. In.
        compact: (K,) the dtype of `dense`, contiguous; no rounding happens here. In.
        offset: Flat index of the first element, as in `fingerprint`, >= 0.

    Returns:
        The `fingerprint` of `dense` as it was, and as it is.

    Example:
        dense [1, 2, 3, 4], mask 0b1010, compact [8, 9] gives dense [1, 8, 3, 9] and the fingerprints of both.
    """
    _check_pair(dense, mask, compact)
    if offset < 0:
        raise ValueError(f"`offset` must be >= 0, got {offset}")
    sums: tuple[tuple[int, int], tuple[int, int]] = choose("patch", dense.device).function(
        dense, mask, compact, offset=offset
    )
    return sums


def compact(
    dense: torch.Tensor, mask: BitMask, out: torch.Tensor, *, accumulate: bool, scale: float = 1.0
) -> torch.Tensor:
    """Move the masked elements of a dense gradient into a compact buffer, in one pass with its sum of squares.

    Args:
        dense: (N,) bfloat16, float16 or float32, contiguous; elements outside the mask, NaN included, do not count. In.
        mask: Bits of N elements, K of them set. In.
        out: (K,) float32, contiguous. In-out.
        accumulate: Add to `out`; otherwise overwrite it.
        scale: Multiplied into every element of `dense`.

    Returns:
        () float64 (float32 on MPS), the sum of squares of `out` as it is afterwards, on its device.

    Example:
        dense [1, 2, 3, 4], mask 0b1010, out [1, 1], accumulate, scale 2 gives out [5, 9] and returns 106.
    """
    check_mask(mask, dense.numel(), dense.device)
    if out.dtype != torch.float32 or out.shape != (mask.count,) or not out.is_contiguous():
        raise ValueError(
            f"`out` must be contiguous torch.float32 of shape ({mask.count},), got {out.dtype} {tuple(out.shape)}"
        )
    _check_flat(dense, "dense", "what is read are elements, in the order of memory")
    sum_of_squares: torch.Tensor = choose("compact", dense.device).function(
        dense, mask, out, accumulate=accumulate, scale=scale
    )
    return sum_of_squares


def check_mask(mask: BitMask, num_elements: int, device: torch.device) -> None:
    """Raise ValueError unless a mask has the length of a tensor and lies on its device."""
    if mask.num_elements != num_elements:
        raise ValueError(f"the mask has {mask.num_elements} elements, the tensor {num_elements}")
    if mask.device != device:
        raise ValueError(f"the mask lies on {mask.device}, the tensor on {device}")


def _check_pair(dense: torch.Tensor, mask: BitMask, compact_values: torch.Tensor) -> None:
    check_mask(mask, dense.numel(), dense.device)
    _check_flat(dense, "dense", "an update of a copy would be lost")
    if compact_values.dtype != dense.dtype:
        raise ValueError(f"`compact` is {compact_values.dtype} but `dense` is {dense.dtype}; round before scattering")
    if compact_values.shape != (mask.count,):
        raise ValueError(f"`compact` has shape {tuple(compact_values.shape)}, the mask has {mask.count} set bits")
    _check_flat(compact_values, "compact", "an update of a copy would be lost")


def _check_flat(tensor: torch.Tensor, name: str, reason: str) -> None:
    if not tensor.is_contiguous() or tensor.dim() != 1:
        raise ValueError(f"`{name}` must be flat and contiguous: {reason}; got shape {tuple(tensor.shape)}")
    if tensor.element_size() not in (2, 4):
        raise ValueError(f"`{name}` must be bfloat16, float16 or float32, got {tensor.dtype}")
