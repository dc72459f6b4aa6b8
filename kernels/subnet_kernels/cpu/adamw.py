"""AdamW on the masked elements of many tensors, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import carray

from subnet_kernels.cpu.blocks import block_size, load_block, prefetch_state, store_block
from subnet_kernels.cpu.jit import as_pointer, compiled
from subnet_kernels.cpu.moves import ROOM, SCRATCH
from subnet_kernels.cpu.steps import run_chunks
from subnet_kernels.cpu.table import (
    COUNT,
    FIRST,
    FIRST_STATE,
    LAST,
    NUM_ELEMENTS,
    ROW,
    SECOND_STATE,
    SLOT,
)
from subnet_kernels.updates import AdamWUpdate


def masked_adamw(updates: Sequence[AdamWUpdate], *, grad_scale: torch.Tensor | None, cache: dict[Any, Any]) -> None:
    """Update the masked elements of every tensor; the operations and their order are the reference's."""
    run_chunks(_step, updates, [update.scalars for update in updates], grad_scale, cache)


@compiled
def _step(rows: Any, scalars: Any, chunks: Any, scale: Any) -> None:
    buffers32 = np.empty((2, ROOM), dtype=np.float32)
    buffers16 = np.empty((3, ROOM), dtype=np.uint16)
    positions = np.empty(ROOM, dtype=np.int32)
    scratch = np.empty(SCRATCH, dtype=np.uint64)
    for number in range(chunks.shape[0]):
        tensor = rows[chunks[number, ROW]]
        exp_avg = carray(as_pointer(tensor[FIRST_STATE]), tensor[COUNT], np.float32)
        exp_avg_sq = carray(as_pointer(tensor[SECOND_STATE]), tensor[COUNT], np.float32)
        slot = chunks[number, SLOT]
        size = block_size(tensor[NUM_ELEMENTS], tensor[COUNT])
        for first in range(chunks[number, FIRST], chunks[number, LAST], size):
            last = min(first + size, chunks[number, LAST])
            grad, weights, n = load_block(tensor, first, last, slot, positions, buffers32, buffers16)
            _update(
                grad, exp_avg[slot : slot + n], exp_avg_sq[slot : slot + n], weights, n,
                scalars[chunks[number, ROW]], scale,
            )  # fmt: skip
            prefetch_state(tensor, slot + n, n)
            store_block(tensor, first, last, slot, positions, weights, buffers16, scratch, n)
            slot += n


@compiled
def _update(grad: Any, exp_avg: Any, exp_avg_sq: Any, weights: Any, n: int, scalars: Any, scale: Any) -> None:
    """Do one AdamW step on (n,) compact values, all float32."""
    decay, lerp, beta2, square = scalars[0], scalars[1], scalars[2], scalars[3]
    step_size, correction, eps = scalars[4], scalars[5], scalars[6]
    for i in range(n):
        scaled = grad[i] * scale
        first = exp_avg[i] + (scaled - exp_avg[i]) * lerp
        second = exp_avg_sq[i] * beta2 + (scaled * square) * scaled
        exp_avg[i] = first
        exp_avg_sq[i] = second
        denominator = np.sqrt(second) * correction + eps
        weights[i] = weights[i] * decay - (first * step_size) / denominator
