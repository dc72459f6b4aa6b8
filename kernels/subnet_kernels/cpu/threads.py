"""As many threads as torch uses, for compiled functions that release the interpreter lock."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

_pools: dict[int, ThreadPoolExecutor] = {}
_this_thread = threading.local()


def num_threads() -> int:
    """Return how many threads an op may use: `torch.get_num_threads()`, and one inside a task of `run`."""
    return 1 if _is_in_task() else torch.get_num_threads()


def run(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call `function` once per task, side by side; the caller's own thread takes the first one.

    Args:
        function: Must release the interpreter lock to gain anything. Ops that it calls stay on its thread: waiting
            for a thread of the pool inside one could last for ever.
        tasks: Its arguments, one tuple per call; as many as `num_threads()` is best.

    Returns:
        What the calls returned, in order; the first exception, or an interrupt, is raised after all have ended.
    """
    if len(tasks) <= 1 or _is_in_task():
        return [function(*task) for task in tasks]
    futures: list[Future[Any]] = []
    try:
        futures.extend(_pool().submit(_in_task, function, task) for task in tasks[1:])
        first = _in_task(function, tasks[0])
    finally:
        _wait_for(futures)
    return [first, *(future.result() for future in futures)]


def _is_in_task() -> bool:
    return getattr(_this_thread, "is_in_task", False)


def _in_task(function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    _this_thread.is_in_task = True
    try:
        return function(*task)
    finally:
        del _this_thread.is_in_task


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
