"""As many threads as torch uses, for compiled functions that release the interpreter lock."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

_pools: dict[int, ThreadPoolExecutor] = {}


def num_threads() -> int:
    """Return how many threads an op may use: `torch.get_num_threads()`."""
    return torch.get_num_threads()


def run(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call `function` once per task, side by side; the caller's own thread takes the first one.

    Args:
        function: Must release the interpreter lock to gain anything.
        tasks: Its arguments, one tuple per call; as many as `num_threads()` is best.

    Returns:
        What the calls returned, in order; the first exception, or an interrupt, is raised after all have ended.
    """
    if len(tasks) <= 1:
        return [function(*task) for task in tasks]
    futures: list[Future[Any]] = []
    try:
        futures.extend(_pool().submit(function, *task) for task in tasks[1:])
        first = function(*tasks[0])
    finally:
        _wait_for(futures)
    return [first, *(future.result() for future in futures)]


def split(num_items: int, parts: int | None = None) -> list[tuple[int, int]]:
    """Cut `range(num_items)` into at most `parts` (`num_threads()` if `None`) runs of nearly equal length.

    Example:
        split(10, 3) is [(0, 3), (3, 6), (6, 10)]; split(1, 3) is [(0, 1)].
    """
    parts = max(1, min(num_threads() if parts is None else parts, num_items))
    bounds = [num_items * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(bounds))


def _wait_for(futures: Sequence[Future[Any]]) -> None:
    """Return when all calls have ended: no thread may still write when the caller goes on, not even after Ctrl-C."""
    interrupt: BaseException | None = None
    while True:
        try:
            wait(futures)
            break
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _pool() -> ThreadPoolExecutor:
    # A forked child has none of its parent's threads, so pools belong to one process.
    process = os.getpid()
    if process not in _pools:
        _pools.clear()
        _pools[process] = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="subnet_kernels")
    return _pools[process]
