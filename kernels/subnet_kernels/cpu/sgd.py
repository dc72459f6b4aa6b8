"""SGD on the masked elements of many tensors, block by block."""

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
from subnet_kernels.cpu.table import COUNT, FIRST, FIRST_STATE, LAST, NUM_ELEMENTS, ROW, SLOT
from subnet_kernels.updates import SGDUpdate


def masked_sgd(updates: Sequence[SGDUpdate], *, grad_scale: torch.Tensor | None, cache: dict[Any, Any]) -> None:
    """Update the masked elements of every tensor; the operations and their order are the reference's."""
    scalars = [(update.lr, update.momentum, update.weight_decay, float(update.nesterov)) for update in updates]
    run_chunks(_step, updates, scalars, grad_scale, cache)


@compiled
def _step(rows: Any, scalars: Any, chunks: Any, scale: Any) -> None:
    buffers32 = np.empty((2, ROOM), dtype=np.float32)
    buffers16 = np.empty((3, ROOM), dtype=np.uint16)
    positions = np.empty(ROOM, dtype=np.int32)
    scratch = np.empty(SCRATCH, dtype=np.uint64)
    for number in range(chunks.shape[0]):
        tensor = rows[chunks[number, ROW]]
        buffer = carray(as_pointer(tensor[FIRST_STATE]), tensor[COUNT], np.float32)
        slot = chunks[number, SLOT]
        size = block_size(tensor[NUM_ELEMENTS], tensor[COUNT])
        for first in range(chunks[number, FIRST], chunks[number, LAST], size):
            last = min(first + size, chunks[number, LAST])
            grad, weights, n = load_block(tensor, first, last, slot, positions, buffers32, buffers16)
            _update(grad, buffer[slot : slot + n], weights, n, scalars[chunks[number, ROW]], scale)
            prefetch_state(tensor, slot + n, n)
            store_block(tensor, first, last, slot, positions, weights, buffers16, scratch, n)
            slot += n


@compiled
def _update(grad: Any, buffer: Any, weights: Any, n: int, scalars: Any, scale: Any) -> None:
    """Do one SGD step on (n,) compact values, all float32; without momentum `buffer` is not touched."""
    lr, momentum, weight_decay = scalars[0], scalars[1], scalars[2]
    if momentum == 0.0:
        for i in range(n):
            weights[i] = weights[i] - (grad[i] * scale + weights[i] * weight_decay) * lr
    elif scalars[3] == 0.0:
        for i in range(n):
            buffer[i] = buffer[i] * momentum + (grad[i] * scale + weights[i] * weight_decay)
            weights[i] = weights[i] - buffer[i] * lr
    else:
        for i in range(n):
            step = grad[i] * scale + weights[i] * weight_decay
            buffer[i] = buffer[i] * momentum + step
            weights[i] = weights[i] - (step + buffer[i] * momentum) * lr
