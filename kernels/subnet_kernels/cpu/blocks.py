"""The steps that all updates share, on one block of a tensor: gradients in, weights in, weights out.

A block's buffers stay in the nearest caches, so every step is a plain loop over them. All functions work on bits
(uint16, uint32) where a value must not be rounded on the way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from subnet_kernels.cpu import avx512, moves, moves_avx512
from subnet_kernels.cpu.decode import decode
from subnet_kernels.cpu.jit import as_pointer, compiled, float_to_half, half_to_float, prefetch
from subnet_kernels.cpu.moves import MAX_BLOCK
from subnet_kernels.cpu.table import (
    BFLOAT16,
    BITS,
    COMPACT,
    COUNT,
    FIRST_STATE,
    FLOAT16,
    FLOAT32,
    FP32,
    GRAD,
    GRAD_KIND,
    IS_ROUNDED,
    MASTER,
    MASTER_KIND,
    NUM_ELEMENTS,
    PARAM,
    PARAM_KIND,
    REMAINDER,
    ROUNDING_KEY,
    SECOND_STATE,
    STOCHASTIC,
)

_moves = moves_avx512 if avx512.is_available() else moves
find, take16, take32 = _moves.find, _moves.take16, _moves.take32
put16, put32, put_changed16 = _moves.put16, _moves.put32, _moves.put_changed16

_MASKED = 4096  # masked elements that make a block worth its fixed costs
_SMALLEST = 4096
_IS_DENSE = 8  # one element in so many is masked, or more
_LINE = 64  # bytes per cache line

_HALF = np.uint32(0x8000)
_SIXTEEN = np.uint32(16)
_QUIET_NAN = np.uint32(0x7FC0)
_INFINITY = np.uint32(0x7F800000)
_NO_SIGN = np.uint32(0x7FFFFFFF)


@compiled
def block_size(num_elements: int, count: int) -> int:
    """Return the elements per block of a tensor: the sparser, the more, so that loops over a block are long."""
    size = _SMALLEST
    while size < MAX_BLOCK and count * size < _MASKED * num_elements:
        size *= 2
    return size


@compiled
def read_dense(
    kind: int, dense: int, bits: int, first: int, last: int, positions: Any, is_full: bool,
    values: Any, buffer16: Any, n: int,
) -> None:  # fmt: skip
    """Read the masked elements of a block of a dense tensor as float32.

    Args:
        kind: BFLOAT16, FLOAT16 or FLOAT32.
        dense, bits, first, last, positions: As in `moves`.
        is_full: Every element is masked, and neither the mask nor `positions` is read.
        values: (ROOM,) float32. Out: (n,) values.
        buffer16: (ROOM,) uint16. Out: (n,) bits, unless `is_full` or FLOAT32.
        n: Masked elements of the block.
    """
    words = values.view(np.uint32)
    if kind == FLOAT32:
        if is_full:
            dense32 = carray(as_pointer(dense), last, np.uint32)[first:]
            for i in range(n):
                words[i] = dense32[i]
        else:
            take32(dense, bits, first, last, positions, values, n)
    else:
        if is_full:
            halves = carray(as_pointer(dense), last, np.uint16)[first:]
        else:
            take16(dense, bits, first, last, positions, buffer16, n)
            halves = buffer16
        if kind == BFLOAT16:
            for i in range(n):
                words[i] = np.uint32(halves[i]) << _SIXTEEN
        else:
            for i in range(n):
                values[i] = half_to_float(halves[i])


@compiled
def round_block(values: Any, out: Any, n: int) -> None:
    """Round (n,) float32 to bfloat16 bits (n,) uint16, ties away from zero; every NaN becomes the quiet one."""
    bits = values.view(np.uint32)
    for i in range(n):
        upper = (bits[i] + _HALF) >> _SIXTEEN
        out[i] = np.uint16(_QUIET_NAN if (bits[i] & _NO_SIGN) > _INFINITY else upper)


@compiled
def round_block_stochastically(
    values: Any, first: int, positions: Any, is_full: bool, key: int, out: Any, n: int
) -> None:
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
def load_block(
    tensor: Any, first: int, last: int, slot: int, positions: Any, buffers32: Any, buffers16: Any
) -> tuple[Any, Any, int]:
    """Bring the masked elements of a block of one tensor together.

    Args:
        tensor: (13,) int64, the tensor's row.
        first, last: The block, in flat elements; `first` is a multiple of 64.
        slot: Compact slot of its first masked element.
        positions: (ROOM,) int32. Out: what `store_block` needs of it.
        buffers32: (2, ROOM) float32, for gradient and weights where they are not already together.
        buffers16: (3, ROOM) uint16. Out: the first row is the weights as they are stored, where that is known.

    Returns:
        The gradient (n,) and the weights (n,), float32, the masters themselves where there are some; and n.
    """
    num_elements, count, master_kind = tensor[NUM_ELEMENTS], tensor[COUNT], tensor[MASTER_KIND]
    is_full = count == num_elements
    if is_full:
        n = last - first
    elif master_kind == STOCHASTIC:  # the random bits depend on the positions
        n = decode(carray(as_pointer(tensor[BITS]), (num_elements + 7) // 8, np.uint8), first, last, positions)
    else:
        n = find(tensor[BITS], first, last, positions)
    if tensor[GRAD_KIND] == COMPACT:
        grad = carray(as_pointer(tensor[GRAD]), count, np.float32)[slot : slot + n]
    else:
        grad = buffers32[0, :n]
        read_dense(
            tensor[GRAD_KIND], tensor[GRAD], tensor[BITS], first, last, positions, is_full, buffers32[0],
            buffers16[2], n,
        )  # fmt: skip
    if master_kind == FP32:
        weights = carray(as_pointer(tensor[MASTER]), count, np.float32)[slot : slot + n]
        if tensor[PARAM_KIND] == BFLOAT16 and tensor[IS_ROUNDED] and not is_full:
            round_block(weights, buffers16[0], n)
    else:
        weights = buffers32[1, :n]
        read_dense(
            tensor[PARAM_KIND], tensor[PARAM], tensor[BITS], first, last, positions, is_full, buffers32[1],
            buffers16[0], n,
        )  # fmt: skip
        if master_kind == REMAINDER:
            remainder = carray(as_pointer(tensor[MASTER]), count, np.int16)[slot : slot + n]
            words = weights.view(np.uint32)
            for i in range(n):
                words[i] = words[i] + np.uint32(np.int32(remainder[i]))
    return grad, weights, n


@compiled
def prefetch_state(tensor: Any, slot: int, n: int) -> None:
    """Ask for the compact state of a sparse tensor's next block, about as long as this one: it comes during the store.

    A denser tensor streams its state, which the processor foresees by itself; asking for more would only disturb it.
    """
    if _IS_DENSE * tensor[COUNT] > tensor[NUM_ELEMENTS]:
        return
    states = (tensor[FIRST_STATE], tensor[SECOND_STATE], tensor[MASTER] if tensor[MASTER_KIND] == FP32 else 0)
    for state in states:
        if state != 0:
            for line in range(4 * slot, 4 * (slot + n), _LINE):
                prefetch(state + line)


@compiled
def store_block(
    tensor: Any, first: int, last: int, slot: int, positions: Any, weights: Any, buffers16: Any, scratch: Any, n: int
) -> None:
    """Round the (n,) float32 weights of a block into the parameter, by the rule of the tensor's master.

    In RL few weights change in a step (arXiv 2602.03839). Where the stored ones are known, only those that change are
    written, and most cache lines of the parameter stay untouched.
    """
    param, bits, master_kind = tensor[PARAM], tensor[BITS], tensor[MASTER_KIND]
    count = tensor[COUNT]
    is_full = count == tensor[NUM_ELEMENTS]
    rounded = buffers16[1]
    if tensor[PARAM_KIND] == FLOAT32:
        if is_full:
            param32 = carray(as_pointer(param), last, np.float32)[first:]
            for i in range(n):
                param32[i] = weights[i]
        else:
            put32(param, bits, first, last, positions, weights, n)
        return
    if is_full:
        rounded = carray(as_pointer(param), last, np.uint16)[first:]
    if tensor[PARAM_KIND] == FLOAT16:
        for i in range(n):
            rounded[i] = float_to_half(weights[i])
    elif master_kind == STOCHASTIC:
        round_block_stochastically(weights, first, positions, is_full, tensor[ROUNDING_KEY], rounded, n)
    else:
        round_block(weights, rounded, n)
        if master_kind == REMAINDER:
            remainder = carray(as_pointer(tensor[MASTER]), count, np.int16)[slot : slot + n]
            keep_remainders(weights, rounded, remainder, n)
    if not is_full:
        if tensor[PARAM_KIND] == BFLOAT16 and (master_kind != FP32 or tensor[IS_ROUNDED]):
            put_changed16(param, bits, first, last, positions, buffers16[0], rounded, scratch, n)
        else:
            put16(param, bits, first, last, positions, rounded, n)
