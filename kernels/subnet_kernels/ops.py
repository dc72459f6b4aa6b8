"""The ops: checked arguments, then the implementation that `dispatch` names."""

from __future__ import annotations

import torch

from subnet_kernels.dispatch import choose
from subnet_kernels.reference import CRITERIA, bits_view, round_to_bfloat16

__all__ = [
    "CRITERIA",
    "bits_view",
    "changed_bits",
    "count_bits",
    "fingerprint",
    "gather",
    "masked_adamw",
    "pack_bits",
    "round_to_bfloat16",
    "scatter",
    "unpack_bits",
]


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
    _check_bits(bits, num_elements)
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


def fingerprint(tensor: torch.Tensor, *, offset: int = 0) -> tuple[int, int]:
    """Sum a 64-bit mix of (flat index, element bits) over a tensor, modulo 2**64, under two seeds.

    The sum adds up over slices: the fingerprint of a tensor is the sum, modulo 2**64, of the fingerprints of its parts,
    each with the offset at which it starts. It identifies a tensor; it does not resist an attacker.

    Args:
        tensor: Any shape, 1-, 2-, 4- or 8-byte dtype; read in C order. In.
        offset: Flat index of the first element, >= 0.

    Returns:
        Two integers in [0, 2**64).

    Example:
        An empty tensor gives (0, 0); swapping two different elements changes both numbers.

    Source: the mix is the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """
    if offset < 0:
        raise ValueError(f"`offset` must be >= 0, got {offset}")
    sums: tuple[int, int] = choose("fingerprint", tensor.device).function(tensor, offset=offset)
    return sums


def gather(dense: torch.Tensor, bits: torch.Tensor, count: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Copy the masked elements of a dense tensor into a new compact one.

    Args:
        dense: (N,) floating. In.
        bits: (ceil(N / 8),) uint8 mask. In.
        count: K, the number of set bits.
        dtype: Dtype of the result.

    Returns:
        (K,) `dtype`.

    Example:
        dense [1, 2, 3, 4] under mask 0b1010 gives [2, 4].
    """
    _check_bits(bits, dense.numel())
    compact: torch.Tensor = choose("gather", dense.device).function(dense, bits, count, dtype=dtype)
    return compact


def scatter(dense: torch.Tensor, bits: torch.Tensor, compact: torch.Tensor) -> None:
    """Write compact values into the masked elements; every other element keeps its bits.

    Args:
        dense: (N,) contiguous. In-out.
        bits: (ceil(N / 8),) uint8 mask. In.
        compact: (K,) the dtype of `dense`; no rounding happens here. In.

    Example:
        dense [1, 2, 3, 4], mask 0b1010, compact [8, 9] gives [1, 8, 3, 9].
    """
    _check_bits(bits, dense.numel())
    if compact.dtype != dense.dtype:
        raise ValueError(f"`compact` is {compact.dtype} but `dense` is {dense.dtype}; round before scattering")
    choose("scatter", dense.device).function(dense, bits, compact)


def masked_adamw(
    param: torch.Tensor,
    bits: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    master: torch.Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: torch.Tensor | None = None,
) -> None:
    """Update the subnetwork of one tensor in place; every other element keeps its bits.

    Args:
        param: (N,) bfloat16, float16 or float32, contiguous. In-out.
        bits: (ceil(N / 8),) uint8 mask with K bits set. In.
        grad: (K,) float32, compact. In.
        exp_avg, exp_avg_sq: (K,) float32, compact moments. In-out.
        master: (K,) float32 masters; or (K,) int16 remainders beside a bfloat16 `param`, which together are the exact
            float32 master; or `None` for a float32 `param`, which is its own master. In-out.
        lr: Step size, >= 0.
        betas: Decay rates of the moments, each in [0, 1).
        eps: Added to the denominator, > 0.
        weight_decay: Decoupled decay rate, >= 0; applied on the mask only.
        step: Number of this update for the tensor, >= 1; the bias corrections use it.
        grad_scale: () float32 on the device of `grad`, multiplied into it (the clip coefficient), or `None`. In.

    Example:
        N = 4, mask 0b1010: elements 0 and 2 of `param` keep their bits. From zero moments with lr 0.1, betas
        (0.9, 0.999), no decay, step 1: an element 1.0 with gradient 0.5 becomes 0.9.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), Algorithm 2.
    """
    _check_bits(bits, param.numel())
    if not param.is_contiguous():
        raise ValueError("`param` must be contiguous: an update of a copy would be lost")
    choose("masked_adamw", param.device).function(
        param,
        bits,
        grad,
        exp_avg,
        exp_avg_sq,
        master,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        grad_scale=grad_scale,
    )


def _check_bits(bits: torch.Tensor, num_elements: int) -> None:
    expected = (num_elements + 7) // 8
    if bits.dtype != torch.uint8 or bits.shape != (expected,):
        raise ValueError(
            f"a mask of {num_elements} elements is uint8 of shape ({expected},), got {bits.dtype} {tuple(bits.shape)}"
        )
