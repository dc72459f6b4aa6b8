"""The steps that all updates share, on one block of a tensor: gradients in, weights in, weights out.

A block is small enough that its buffers stay in the first-level cache, so every step is a plain loop over them. All
functions work on bits (uint16, uint32) where a value must not be rounded on the way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from subnet_kernels.cpu.decode import ROOM as DECODE_ROOM
from subnet_kernels.cpu.decode import decode
from subnet_kernels.cpu.jit import as_pointer, compiled, float_to_half, half_to_float, trailing_zeros
from subnet_kernels.cpu.table import (
    BFLOAT16,
    BITS,
    COMPACT,
    COUNT,
    FLOAT16,
    FLOAT32,
    FP32,
    GRAD,
    GRAD_KIND,
    IS_ROUNDED,
    MASTER,
    MASTER_KIND,
    NUM_ELEMENTS,
    OWN,
    PARAM,
    PARAM_KIND,
    REMAINDER,
    ROUNDING_KEY,
    STOCHASTIC,
)

BLOCK = 2048
"""Elements per block."""
ROOM = BLOCK + DECODE_ROOM
"""Length of a block's buffers; decoding may write a few entries too many."""

_HALF = np.uint32(0x8000)
_SIXTEEN = np.uint32(16)
_QUIET_NAN = np.uint32(0x7FC0)
_INFINITY = np.uint32(0x7F800000)
_NO_SIGN = np.uint32(0x7FFFFFFF)


@compiled
def load_grad(kind: int, grad16: Any, grad32: Any, first: int, positions: Any, is_full: bool, out: Any, n: int) -> None:
    """Read the masked elements of a block of a dense gradient as float32.

    Args:
        kind: BFLOAT16, FLOAT16 or FLOAT32.
        grad16, grad32: (N,) uint16 bits and (N,) float32, two views of one gradient; the one of its kind is read.
        first: Flat index of the block's first element.
        positions: (n,) int32 of the masked elements, from `first`.
        is_full: Every element is masked and `positions` is not read.
        out: (n,) float32. Out.
        n: Masked elements of the block.
    """
    bits = out.view(np.uint32)
    if kind == BFLOAT16:
        if is_full:
            for i in range(n):
                bits[i] = np.uint32(grad16[first + i]) << _SIXTEEN
        else:
            for i in range(n):
                bits[i] = np.uint32(grad16[first + np.int64(positions[i])]) << _SIXTEEN
    elif kind == FLOAT16:
        for i in range(n):
            out[i] = half_to_float(grad16[first + (i if is_full else np.int64(positions[i]))])
    else:
        for i in range(n):
            out[i] = grad32[first + (i if is_full else np.int64(positions[i]))]


@compiled
def load_weights(
    master_kind: int, param16: Any, param32: Any, remainder: Any, first: int, positions: Any, is_full: bool,
    out: Any, n: int,
) -> None:  # fmt: skip
    """Read the masked weights of a block as float32: own masters, joined remainders, or the stored bfloat16."""
    bits = out.view(np.uint32)
    if master_kind == OWN:
        for i in range(n):
            out[i] = param32[first + (i if is_full else np.int64(positions[i]))]
    else:
        for i in range(n):
            at = first + (i if is_full else np.int64(positions[i]))
            bits[i] = np.uint32(param16[at]) << _SIXTEEN
        if master_kind == REMAINDER:
            for i in range(n):
                bits[i] = bits[i] + np.uint32(np.int32(remainder[i]))


@compiled
def round_block(values: Any, out: Any, n: int) -> None:
    """Round (n,) float32 to bfloat16 bits (n,) uint16, ties away from zero; every NaN becomes the quiet one."""
    bits = values.view(np.uint32)
    for i in range(n):
        upper = (bits[i] + _HALF) >> _SIXTEEN
        out[i] = np.uint16(_QUIET_NAN if (bits[i] & _NO_SIGN) > _INFINITY else upper)


@compiled
def round_block_stochastically(values: Any, first: int, positions: Any, is_full: bool, key: int, out: Any, n: int) -> None:
    """Round (n,) float32 to bfloat16 bits with the random bits of every element's flat index (`rounding_key`)."""
    bits = values.view(np.uint32)
    for i in range(n):
        at = np.uint64(first + (i if is_full else np.int64(positions[i])) + 1)
        x = at * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
        upper = (bits[i] + np.uint32(x >> np.uint64(48))) >> _SIXTEEN
        out[i] = np.uint16(_QUIET_NAN if (bits[i] & _NO_SIGN) > _INFINITY else upper)


@compiled
def keep_remainders(values: Any, rounded: Any, remainder: Any, n: int) -> None:
    """Store what rounding dropped, (n,) int16; 0 beside a NaN."""
    bits = values.view(np.uint32)
    for i in range(n):
        rest = np.int32(bits[i]) - np.int32(np.uint32(rounded[i]) << _SIXTEEN)
        remainder[i] = np.int16(0 if (bits[i] & _NO_SIGN) > _INFINITY else rest)


@compiled
def store_bits(param16: Any, first: int, positions: Any, is_full: bool, values: Any, n: int) -> None:
    """Write (n,) uint16 weights of a block back; nothing between the masked elements is touched."""
    if is_full:
        for i in range(n):
            param16[first + i] = values[i]
    else:
        for i in range(n):
            param16[first + np.int64(positions[i])] = values[i]


@compiled
def store_changed(param16: Any, first: int, positions: Any, before: Any, after: Any, changed: Any, n: int) -> None:
    """Write those of the (n,) uint16 weights back whose rounding changed; the others are not even read.

    In RL few weights change in a step (arXiv 2602.03839), so most cache lines of the weights stay untouched.

    Args:
        changed: (ROOM,) uint8, a buffer.
    """
    for i in range(n):
        changed[i] = np.uint8(before[i] != after[i])
    for i in range(n, n + 8):
        changed[i] = np.uint8(0)
    words = changed.view(np.uint64)
    for word in range((n + 7) >> 3):
        left = words[word]
        while left != np.uint64(0):
            i = word * 8 + np.int64(trailing_zeros(left) >> np.uint64(3))
            left &= left - np.uint64(1)
            param16[first + np.int64(positions[i])] = after[i]


@compiled
def store_float32(param32: Any, first: int, positions: Any, is_full: bool, values: Any, n: int) -> None:
    """Write (n,) float32 weights of a block back."""
    for i in range(n):
        param32[first + (i if is_full else np.int64(positions[i]))] = values[i]


@compiled
def store_halves(param16: Any, first: int, positions: Any, is_full: bool, values: Any, n: int) -> None:
    """Write (n,) float32 weights of a block back as float16, rounded to the nearest, ties to even."""
    for i in range(n):
        param16[first + (i if is_full else np.int64(positions[i]))] = float_to_half(values[i])


@compiled
def load_block(
    tensor: Any, first: int, last: int, slot: int, positions: Any, buffers32: Any, buffers16: Any
) -> tuple[Any, Any, int]:
    """Bring the masked elements of a block of one tensor together.

    Args:
        tensor: (13,) int64, the tensor's row.
        first, last: The block, in flat elements; `first` is a multiple of 64.
        slot: Compact slot of its first masked element.
        positions: (ROOM,) int32. Out: the masked elements, counted from `first`, unless all are masked.
        buffers32: (2, ROOM) float32, for gradient and weights where they are not already together.
        buffers16: (2, ROOM) uint16. Out, for float32 masters: the first row is the weights' present rounding.

    Returns:
        The gradient (n,) and the weights (n,), float32, the masters themselves where there are some; and n.
    """
    num_elements, count = tensor[NUM_ELEMENTS], tensor[COUNT]
    is_full = count == num_elements
    if is_full:
        n = last - first
    else:
        n = decode(carray(as_pointer(tensor[BITS]), (num_elements + 7) // 8, np.uint8), first, last, positions)
    if tensor[GRAD_KIND] == COMPACT:
        grad = carray(as_pointer(tensor[GRAD]), count, np.float32)[slot : slot + n]
    else:
        grad = buffers32[0, :n]
        grad16 = carray(as_pointer(tensor[GRAD]), num_elements, np.uint16)
        grad32 = carray(as_pointer(tensor[GRAD]), num_elements, np.float32)
        load_grad(tensor[GRAD_KIND], grad16, grad32, first, positions, is_full, grad, n)
    if tensor[MASTER_KIND] == FP32:
        weights = carray(as_pointer(tensor[MASTER]), count, np.float32)[slot : slot + n]
        if tensor[PARAM_KIND] == BFLOAT16 and tensor[IS_ROUNDED] and not is_full:
            round_block(weights, buffers16[0], n)
    else:
        weights = buffers32[1, :n]
        param16 = carray(as_pointer(tensor[PARAM]), num_elements, np.uint16)
        param32 = carray(as_pointer(tensor[PARAM]), num_elements, np.float32)
        remainder = carray(as_pointer(tensor[MASTER]), count, np.int16)[slot : slot + n]
        load_weights(tensor[MASTER_KIND], param16, param32, remainder, first, positions, is_full, weights, n)
    return grad, weights, n


@compiled
def store_block(
    tensor: Any, first: int, slot: int, positions: Any, weights: Any, buffers16: Any, changed: Any, n: int
) -> None:
    """Round the (n,) float32 weights of a block into the parameter, by the rule of the tensor's master."""
    num_elements, count = tensor[NUM_ELEMENTS], tensor[COUNT]
    is_full = count == num_elements
    param16 = carray(as_pointer(tensor[PARAM]), num_elements, np.uint16)
    if tensor[PARAM_KIND] == FLOAT32:
        param32 = carray(as_pointer(tensor[PARAM]), num_elements, np.float32)
        store_float32(param32, first, positions, is_full, weights, n)
    elif tensor[PARAM_KIND] == FLOAT16:
        store_halves(param16, first, positions, is_full, weights, n)
    elif tensor[MASTER_KIND] == STOCHASTIC:
        round_block_stochastically(weights, first, positions, is_full, tensor[ROUNDING_KEY], buffers16[1], n)
        store_bits(param16, first, positions, is_full, buffers16[1], n)
    else:
        round_block(weights, buffers16[1], n)
        if tensor[MASTER_KIND] == REMAINDER:
            remainder = carray(as_pointer(tensor[MASTER]), count, np.int16)[slot : slot + n]
            keep_remainders(weights, buffers16[1], remainder, n)
        if tensor[MASTER_KIND] == FP32 and tensor[IS_ROUNDED] and not is_full:
            store_changed(param16, first, positions, buffers16[0], buffers16[1], changed, n)
        else:
            store_bits(param16, first, positions, is_full, buffers16[1], n)
