"""The kernels of an optimizer step: AdamW and SGD over the tiles of many tensors.

A row of the table is one tensor: 64-bit addresses, then float32 scalars. Each operation rounds to float32 by itself,
in the order of the reference. Rules: `adamw`, `sgd`, `momentum`, `nesterov`. Kinds of masters: `own` (a float32 weight
is its own), `float32`, `remainder` (int16), `stochastic` (none).
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from subnet_kernels.gpu.launch import kernel
from subnet_kernels.gpu.slots import (
    SLOTS_PER_PASS,
    TILE_SIZE,
    find_elements,
    first_slot,
    load_words,
    pass_slots,
)
from subnet_kernels.gpu.values import bits_pointer, join, narrow, round_stochastically, split, widen

COLUMNS = 16
"""64-bit columns of a row: nine as named below, and scalars as pairs of float32 from `SCALARS` on."""

PARAM, BITS, OFFSETS, BASES, GRAD, FIRST_STATE, SECOND_STATE, MASTER, ROUNDING_KEY, SCALARS = range(10)

_COLUMNS = tl.constexpr(COLUMNS)
_PARAM = tl.constexpr(PARAM)
_BITS = tl.constexpr(BITS)
_OFFSETS = tl.constexpr(OFFSETS)
_BASES = tl.constexpr(BASES)
_GRAD = tl.constexpr(GRAD)
_FIRST_STATE = tl.constexpr(FIRST_STATE)
_SECOND_STATE = tl.constexpr(SECOND_STATE)
_MASTER = tl.constexpr(MASTER)
_ROUNDING_KEY = tl.constexpr(ROUNDING_KEY)
_SCALARS = tl.constexpr(SCALARS)


@kernel
def step_slots(
    tiles_ptr: tl.tensor,
    table_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    RULE: tl.constexpr,
    PARAM_KIND: tl.constexpr,
    GRAD_KIND: tl.constexpr,
    MASTER_KIND: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
) -> None:
    """Update the masked elements of one tile of one tensor; the others are neither read nor written.

    Example:
        N = 4, mask 0b1010, SGD with lr 0.1: elements 1 and 3 with value 1.0 and gradient 0.5 become 0.95.

    Args:
        tiles_ptr: (P, 2) int32, the row and the tile of every program. In.
        table_ptr: (R, COLUMNS) int64. In.
        scale_ptr: () float32, multiplied into every gradient. In.
    """
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(tiles_ptr + 2 * program).to(tl.int64) * _COLUMNS
    tile = tl.load(tiles_ptr + 2 * program + 1).to(tl.int64)
    offsets_ptr = tl.load(row_ptr + _OFFSETS).to(tl.pointer_type(tl.int32))
    bases_ptr = tl.load(row_ptr + _BASES).to(tl.pointer_type(tl.int64))
    slot = first_slot(offsets_ptr, bases_ptr, tile)
    words, before, count = load_words(tl.load(row_ptr + _BITS), tile)
    pointers = _pointers(row_ptr, tile * TILE_SIZE, slot, PARAM_KIND, GRAD_KIND, MASTER_KIND)
    scalars = _scalars(row_ptr, RULE)
    scale = tl.load(scale_ptr)
    for start in range(0, count, SLOTS_PER_PASS):
        slots = pass_slots(start)
        elements = find_elements(words, before, slots, False)
        _update(
            row_ptr, pointers, scalars, scale, tile * TILE_SIZE, slots, elements, slots < count,
            RULE, PARAM_KIND, GRAD_KIND, MASTER_KIND, IS_ROUNDED, False,
        )  # fmt: skip


@kernel
def step_full(
    tiles_ptr: tl.tensor,
    table_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    RULE: tl.constexpr,
    PARAM_KIND: tl.constexpr,
    GRAD_KIND: tl.constexpr,
    MASTER_KIND: tl.constexpr,
) -> None:
    """Update every element of one whole tile of a tensor under a full mask, in loads and stores of 16 bytes.

    Example:
        N = 1,024, all masked, SGD with lr 0.1: elements with value 1.0 and gradient 0.5 become 0.95.

    Args:
        tiles_ptr: (P, 2) int32, the row and the tile of every program. In.
        table_ptr: (R, COLUMNS) int64; its addresses are multiples of 16. In.
        scale_ptr: () float32, multiplied into every gradient. In.
    """
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(tiles_ptr + 2 * program).to(tl.int64) * _COLUMNS
    tile = tl.load(tiles_ptr + 2 * program + 1).to(tl.int64)
    param_ptr, grad_ptr, first_ptr, second_ptr, master_ptr = _pointers(
        row_ptr, tile * TILE_SIZE, tile * TILE_SIZE, PARAM_KIND, GRAD_KIND, MASTER_KIND
    )
    pointers = (
        tl.multiple_of(param_ptr, 16),
        tl.multiple_of(grad_ptr, 16),
        tl.multiple_of(first_ptr, 16),
        tl.multiple_of(second_ptr, 16),
        tl.multiple_of(master_ptr, 16),
    )
    elements = tl.arange(0, TILE_SIZE)
    _update(
        row_ptr, pointers, _scalars(row_ptr, RULE), tl.load(scale_ptr), tile * TILE_SIZE, elements, elements, None,
        RULE, PARAM_KIND, GRAD_KIND, MASTER_KIND, False, True,
    )  # fmt: skip


@kernel
def _pointers(
    row_ptr: tl.tensor,
    element: tl.tensor,
    slot: tl.tensor,
    PARAM_KIND: tl.constexpr,
    GRAD_KIND: tl.constexpr,
    MASTER_KIND: tl.constexpr,
) -> Any:
    """Return where a tile starts in the weights, the gradient, both states and the masters of a row.

    Example:
        Tile 1 begins at element 1,024 of its weights and, after 7 set bits, at slot 7 of its states.
    """
    # The 64-bit part of every offset is a scalar; inside a tile 32 bits are plenty.
    param_ptr = bits_pointer(tl.load(row_ptr + _PARAM), PARAM_KIND) + element
    grad_ptr = bits_pointer(tl.load(row_ptr + _GRAD), GRAD_KIND) + (slot if GRAD_KIND == "compact" else element)
    first_ptr = tl.load(row_ptr + _FIRST_STATE).to(tl.pointer_type(tl.float32)) + slot
    second_ptr = tl.load(row_ptr + _SECOND_STATE).to(tl.pointer_type(tl.float32)) + slot
    master_kind: tl.constexpr = tl.int16 if MASTER_KIND == "remainder" else tl.float32
    master_ptr = tl.load(row_ptr + _MASTER).to(tl.pointer_type(master_kind)) + slot
    return param_ptr, grad_ptr, first_ptr, second_ptr, master_ptr


@kernel
def _scalars(row_ptr: tl.tensor, RULE: tl.constexpr) -> Any:
    """Return the seven float32 scalars of a row; a rule other than AdamW has three and repeats the first.

    Example:
        SGD with decay 0.1, momentum 0.9 and lr 0.5 has (0.1, 0.9, 0.5, 0.1, 0.1, 0.1, 0.1).
    """
    scalars_ptr = (row_ptr + _SCALARS).to(tl.pointer_type(tl.float32))
    first = tl.load(scalars_ptr)
    second = tl.load(scalars_ptr + 1)
    third = tl.load(scalars_ptr + 2)
    if RULE == "adamw":
        scalars = (
            first,
            second,
            third,
            tl.load(scalars_ptr + 3),
            tl.load(scalars_ptr + 4),
            tl.load(scalars_ptr + 5),
            tl.load(scalars_ptr + 6),
        )
    else:
        scalars = (first, second, third, first, first, first, first)
    return scalars


@kernel
def _update(
    row_ptr: tl.tensor,
    pointers: tl.tensor,
    scalars: tl.tensor,
    scale: tl.tensor,
    first_element: tl.tensor,
    slots: tl.tensor,
    elements: tl.tensor,
    is_active: tl.tensor,
    RULE: tl.constexpr,
    PARAM_KIND: tl.constexpr,
    GRAD_KIND: tl.constexpr,
    MASTER_KIND: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    IS_FULL: tl.constexpr,
) -> None:
    """Update the lanes that are active, or all of them, from their slots and elements.

    Example:
        A lane with slot 1 and element 3 changes element 3 of the weights by slot 1 of the states.
    """
    param_ptr, grad_ptr, first_ptr, second_ptr, master_ptr = pointers
    grad_at = slots if GRAD_KIND == "compact" else elements
    grad = widen(_load(grad_ptr + grad_at, is_active, 0, IS_FULL), GRAD_KIND) * scale
    if MASTER_KIND == "float32":
        weight = _load(master_ptr + slots, is_active, 1.0, IS_FULL)
    else:
        bits = _load(param_ptr + elements, is_active, 0, IS_FULL)
        if MASTER_KIND == "remainder":
            weight = join(bits, _load(master_ptr + slots, is_active, 0, IS_FULL))
        else:
            weight = widen(bits, PARAM_KIND)
    old = weight
    if RULE == "adamw":
        # 1.0 in idle lanes: at 0.0 the square root and the division would take their slow paths.
        exp_avg = _load(first_ptr + slots, is_active, 1.0, IS_FULL)
        exp_avg_sq = _load(second_ptr + slots, is_active, 1.0, IS_FULL)
        decay, lerp, beta2, square, step_size, correction, eps = scalars
        exp_avg = exp_avg + (grad - exp_avg) * lerp
        exp_avg_sq = exp_avg_sq * beta2 + (grad * square) * grad
        denominator = tl.sqrt_rn(exp_avg_sq) * correction + eps
        weight = weight * decay - tl.div_rn(exp_avg * step_size, denominator)
        _store(first_ptr + slots, exp_avg, is_active, IS_FULL)
        _store(second_ptr + slots, exp_avg_sq, is_active, IS_FULL)
    else:
        weight_decay, momentum, lr, _, _, _, _ = scalars
        grad = grad + weight * weight_decay
        if RULE != "sgd":
            buffer = _load(first_ptr + slots, is_active, 0.0, IS_FULL) * momentum + grad
            _store(first_ptr + slots, buffer, is_active, IS_FULL)
            grad = grad + buffer * momentum if RULE == "nesterov" else buffer
        weight = weight - grad * lr
    if MASTER_KIND == "remainder":
        rounded, remainder = split(weight)
        _store(master_ptr + slots, remainder, is_active, IS_FULL)
    elif MASTER_KIND == "stochastic":
        index = (first_element + elements).to(tl.uint64)
        rounded = round_stochastically(weight, index, tl.load(row_ptr + _ROUNDING_KEY).to(tl.uint64))
    else:
        rounded = narrow(weight, PARAM_KIND)
        if MASTER_KIND == "float32":
            _store(master_ptr + slots, weight, is_active, IS_FULL)
    if IS_ROUNDED:
        # The weight is the old master rounded, so most weights need not be touched: few roundings change in a step.
        _store(param_ptr + elements, rounded, is_active & (rounded != narrow(old, PARAM_KIND)), IS_FULL)
    else:
        _store(param_ptr + elements, rounded, is_active, IS_FULL)


@kernel
def _load(pointers: tl.tensor, is_active: tl.tensor, OTHER: tl.constexpr, IS_FULL: tl.constexpr) -> Any:
    """Load the lanes that are active, or all of them without a mask.

    Example:
        [5, 6] with active [1, 0] and other 1 gives [5, 1].
    """
    return tl.load(pointers) if IS_FULL else tl.load(pointers, mask=is_active, other=OTHER)


@kernel
def _store(pointers: tl.tensor, values: tl.tensor, is_active: tl.tensor, IS_FULL: tl.constexpr) -> None:
    """Store the lanes that are active, or all of them without a mask.

    Example:
        [7, 8] with active [1, 0] into [5, 6] leaves [7, 6].
    """
    if IS_FULL:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=is_active)
