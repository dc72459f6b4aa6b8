"""Work side by side: order, failures, and a fork."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
import torch
from interrupts import interrupted_at

from subnet_kernels.cpu import threads


def test_run_returns_in_the_order_of_the_tasks() -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.01 * (4 - number))
        return number

    assert threads.run(slow_first, [(number,) for number in range(5)]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [0, 1])
def test_run_of_one_task_stays_on_the_callers_thread(count: int) -> None:
    assert threads.run(threading.get_ident, [()] * count) == [threading.get_ident()] * count


def test_run_calls_side_by_side() -> None:
    together = threading.Barrier(2, timeout=10)
    assert sorted(threads.run(together.wait, [(), ()])) == [0, 1]


def test_run_inside_a_task_stays_on_its_thread() -> None:
    """More tasks than the pool has threads, which all wait for tasks of their own, would wait for ever."""

    def outer() -> list[int]:
        assert threads.num_threads() == 1
        return threads.run(threading.get_ident, [(), (), ()])

    found = threads.run(outer, [()] * (4 * (os.cpu_count() or 1)))
    assert all(len(set(idents)) == 1 for idents in found)
    assert threads.num_threads() == torch.get_num_threads()


@pytest.mark.parametrize("failing", [0, 1])
def test_run_raises_after_all_have_ended(failing: int) -> None:
    ended = []

    def work(number: int) -> None:
        if number == failing:
            raise ValueError(f"task {number}")
        time.sleep(0.05)
        ended.append(number)

    with pytest.raises(ValueError, match=f"task {failing}"):
        threads.run(work, [(number,) for number in range(3)])
    assert sorted(ended) == sorted({0, 1, 2} - {failing})


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system sends no signals to threads")
def test_run_raises_an_interrupt_after_all_have_ended() -> None:
    ended = []

    def work(number: int) -> None:
        for _ in range(2 * number):
            time.sleep(0.05)
            if number == 1:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if number == 2:
            ended.append(number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            threads.run(work, [(number,) for number in range(3)])
        assert ended == [2]
    finally:
        signal.signal(signal.SIGINT, before)


def test_run_interrupted_at_any_line_leaves_no_call_behind() -> None:
    """Also inside the standard library, should tasks be handed to its pools again."""
    running: list[int] = []

    def work(number: int) -> None:
        running.append(number)
        time.sleep(0.002)
        running.remove(number)

    for line in range(1000):
        try:
            with interrupted_at(line, ("/subnet_kernels/cpu/threads.py", "/concurrent/futures/thread.py")):
                threads.run(work, [(number,) for number in range(3)])
        except KeyboardInterrupt:
            assert running == []
            assert threads.num_threads() == torch.get_num_threads()
        else:
            break
    assert line > 15
    assert sorted(threads.run(int, [(number,) for number in range(3)])) == [0, 1, 2]


def test_split_gives_the_runs_of_its_example() -> None:
    assert threads.split(10, 3) == [(0, 3), (3, 6), (6, 10)]
    assert threads.split(1, 3) == [(0, 1)]


@pytest.mark.parametrize("num_items", [0, 1, 7, 1000])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_split_covers_every_item_once(num_items: int, parts: int) -> None:
    runs = threads.split(num_items, parts)
    assert [item for start, stop in runs for item in range(start, stop)] == list(range(num_items))
    assert max(stop - start for start, stop in runs) - min(stop - start for start, stop in runs) <= 1
    assert len(runs) <= parts


def test_split_follows_the_threads_of_torch() -> None:
    torch.set_num_threads(3)
    assert threads.num_threads() == 3
    assert len(threads.split(100)) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_run_works_after_a_fork() -> None:
    threads.run(int, [(1,), (2,)])  # the parent's pool has a thread, which the child will not have
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if threads.run(int, [(1,), (2,)]) == [1, 2] else 1)
        finally:
            os._exit(2)
    for _ in range(1000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for a thread that it does not have")
    assert os.waitstatus_to_exitcode(status) == 0, sys.platform
