"""What a compiled step reads: one row per tensor, and chunks of tensors as work for the threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from subnet_kernels.cpu.threads import num_threads
from subnet_kernels.layout import SEGMENT_TILES, TILE_SIZE, BitMask
from subnet_kernels.updates import AdamWUpdate, SGDUpdate

# Columns of a row.
PARAM, BITS, GRAD, FIRST_STATE, SECOND_STATE, MASTER, NUM_ELEMENTS, COUNT = range(8)
PARAM_KIND, GRAD_KIND, MASTER_KIND, IS_ROUNDED, ROUNDING_KEY = range(8, 13)

# Columns of a chunk: a run of whole tiles of one tensor, and the compact slot at which it starts.
ROW, FIRST, LAST, SLOT = range(4)

# Kinds of weights and dense gradients; COMPACT is a gradient that already is (K,) float32.
BFLOAT16, FLOAT16, FLOAT32, COMPACT = range(4)
# Kinds of masters. OWN: a float32 weight is its own. STOCHASTIC: there is none.
OWN, FP32, REMAINDER, STOCHASTIC = range(4)

KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
_CHUNKS_PER_THREAD = 8  # some tensors are denser than others, and the threads should end together


def row(
    update: AdamWUpdate | SGDUpdate, first_state: torch.Tensor | None, second_state: torch.Tensor | None
) -> list[int]:
    """Return one tensor's row of addresses, sizes and kinds."""
    param, mask, grad, master = update.param, update.mask, update.grad, update.master
    is_compact = grad.dtype == torch.float32 and grad.shape == (mask.count,)
    if master is None:
        master_kind = OWN if param.dtype == torch.float32 else STOCHASTIC
    else:
        master_kind = REMAINDER if master.dtype == torch.int16 else FP32
    return [
        param.data_ptr(),
        mask.bits.data_ptr(),
        grad.data_ptr(),
        0 if first_state is None else first_state.data_ptr(),
        0 if second_state is None else second_state.data_ptr(),
        0 if master is None else master.data_ptr(),
        mask.num_elements,
        mask.count,
        KINDS[param.dtype],
        COMPACT if is_compact else KINDS[grad.dtype],
        master_kind,
        int(update.is_rounded),
        update.rounding_key or 0,
    ]


def rows(updates: Sequence[AdamWUpdate] | Sequence[SGDUpdate]) -> np.ndarray:
    """Return the rows (R, 13) int64 of all tensors; made anew in every step, since any of them may have moved."""
    return np.array([row(update, *_states(update)) for update in updates], dtype=np.int64)


def _states(update: AdamWUpdate | SGDUpdate) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if isinstance(update, AdamWUpdate):
        return update.exp_avg, update.exp_avg_sq
    return update.momentum_buffer, None


def chunks(masks: Sequence[BitMask], cache: dict[Any, Any]) -> list[np.ndarray]:
    """Cut tensors into runs of tiles of about equal work; each array (C, 4) int64 is the work of one call.

    Args:
        masks: One per tensor, in the order of the rows.
        cache: Holds the cut from one step to the next.
    """
    key = ("chunks", num_threads(), *(id(mask) for mask in masks))
    if cache.get("chunks_key") != key:
        cache["chunks_key"] = key
        cache["chunks_of"] = list(masks)  # a mask that is kept alive keeps its id
        cache["chunks"] = _cut(masks)
    found: list[np.ndarray] = cache["chunks"]
    return found


def _cut(masks: Sequence[BitMask]) -> list[np.ndarray]:
    # Reading a weight's bit and gradient costs about a tenth of updating a weight.
    work = [mask.num_elements + 10 * mask.count for mask in masks]
    share = max(1, -(-sum(work) // (_CHUNKS_PER_THREAD * num_threads())))
    parts: list[list[list[int]]] = [[]]
    left = share
    for number, mask in enumerate(masks):
        if not mask.count:
            continue
        per_tile = work[number] / mask.num_tiles
        tile = 0
        while tile < mask.num_tiles:
            take = min(mask.num_tiles - tile, max(1, round(left / per_tile)))
            slot = int(mask.bases[tile // SEGMENT_TILES]) + int(mask.offsets[tile])
            last = min((tile + take) * TILE_SIZE, mask.num_elements)
            parts[-1].append([number, tile * TILE_SIZE, last, slot])
            left -= round(take * per_tile)
            tile += take
            if left <= 0:
                parts.append([])
                left = share
    return [np.array(part, dtype=np.int64) for part in parts if part]
