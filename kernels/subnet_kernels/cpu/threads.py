"""As many threads as torch uses, for compiled functions that release the interpreter lock."""

from __future__ import annotations

import _thread
import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import torch

_queues: dict[int, SimpleQueue[Callable[[], None]]] = {}
_this_thread = threading.local()
_PATIENCE = 0.05  # seconds after which helpers are counted again, should an interrupt have lost the news of one


def num_threads() -> int:
    """Return how many threads an op may use: `torch.get_num_threads()`, and one inside a task of `run`."""
    return 1 if _is_in_task() else torch.get_num_threads()


def run(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call `function` once per task, side by side; the caller's own thread takes its share.

    Args:
        function: Must release the interpreter lock to gain anything. Ops that it calls stay on its thread: waiting
            for a thread of the pool inside one could last for ever.
        tasks: Its arguments, one tuple per call; as many as `num_threads()` is best.

    Returns:
        What the calls returned, in order; the first exception, or an interrupt, is raised after all have ended.
    """
    if len(tasks) <= 1 or _is_in_task():
        return [function(*task) for task in tasks]
    unclaimed = iter(range(len(tasks)))  # each number goes to one thread
    results: dict[int, Any] = {}
    errors: dict[int, Exception] = {}
    interrupts: list[BaseException] = []
    started: list[None] = []
    ended: list[None] = []
    news: SimpleQueue[None] = SimpleQueue()

    def work() -> None:
        for number in unclaimed:
            try:
                results[number] = function(*tasks[number])
            except Exception as error:
                errors[number] = error

    def help_out() -> None:
        started.append(None)
        try:
            _in_task(work)
        except BaseException as error:
            interrupts.append(error)
        ended.append(None)
        news.put(None)

    # An interrupt may come at any step, also between a call and what is done with its result. So helpers count
    # themselves, and one that starts when every task has gone to some thread finds nothing to do.
    missing = len(tasks) - 1
    while True:
        try:
            while missing:
                missing -= 1
                _helpers().put(help_out)
            _in_task(work)
            while len(ended) < len(started):
                with contextlib.suppress(Empty):
                    news.get(timeout=_PATIENCE)
            break
        except BaseException as error:
            interrupts.append(error)
    try:
        for raised in (*interrupts, *(errors[number] for number in sorted(errors))):
            raise raised
        return [results[number] for number in range(len(tasks))]
    finally:
        interrupts.clear()  # which hold this frame
        errors.clear()


def _is_in_task() -> bool:
    return getattr(_this_thread, "is_in_task", False)


def _in_task(work: Callable[[], None]) -> None:
    try:
        _this_thread.is_in_task = True
        work()
    finally:
        _this_thread.is_in_task = False


def split(num_items: int, parts: int | None = None) -> list[tuple[int, int]]:
    """Cut `range(num_items)` into at most `parts` (`num_threads()` if `None`) runs of nearly equal length.

    Example:
        split(10, 3) is [(0, 3), (3, 6), (6, 10)]; split(1, 3) is [(0, 1)].
    """
    parts = max(1, min(num_threads() if parts is None else parts, num_items))
    bounds = [num_items * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(bounds))


def _helpers() -> SimpleQueue[Callable[[], None]]:
    """Return the queue of what the other threads of this process shall do."""
    # A forked child has none of its parent's threads, so they belong to one process.
    process = os.getpid()
    if process not in _queues:
        _queues.clear()
        queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        for _ in range(os.cpu_count() or 1):
            # Pools and `threading.Thread` have locks in Python code, which an interrupt there leaves locked for ever.
            _thread.start_new_thread(_serve, (queue,))
        _queues[process] = queue
    return _queues[process]


def _serve(queue: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        queue.get()()
