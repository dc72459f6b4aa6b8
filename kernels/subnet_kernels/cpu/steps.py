"""One optimizer step over chunks of many tensors: what AdamW and SGD share around their own arithmetic."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from subnet_kernels.cpu import table
from subnet_kernels.cpu.threads import num_threads, run
from subnet_kernels.updates import AdamWUpdate, SGDUpdate


def run_chunks(
    function: Callable[..., None],
    updates: Sequence[AdamWUpdate] | Sequence[SGDUpdate],
    scalars: Sequence[Sequence[float]],
    grad_scale: torch.Tensor | None,
    cache: dict[Any, Any],
) -> None:
    """Run a compiled step over all tensors, on all threads.

    Args:
        function: Takes rows (R, 13) int64, scalars (R, S) float32, a chunk array (C, 4) int64 and the gradients' scale.
        updates: The tensors, in the order of the rows.
        scalars: The numbers of each tensor.
        grad_scale: () float32 or `None`.
        cache: Kept by the caller from one step to the next.
    """
    row_table = table.rows(updates)
    scalar_table = np.array(scalars, dtype=np.float64).astype(np.float32)
    scale = np.float32(1.0 if grad_scale is None else float(grad_scale))
    chunks = table.chunks([update.mask for update in updates], cache)
    left = deque(chunks)  # takes are atomic also without an interpreter lock; an iterator may yield a chunk twice

    def work() -> None:
        while True:
            try:
                chunk = left.popleft()  # whichever thread is free takes the next one
            except IndexError:
                return
            function(row_table, scalar_table, chunk, scale)

    run(work, [()] * min(num_threads(), len(chunks)))
