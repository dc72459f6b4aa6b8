"""Find the answer in a text and compare two answers, in bounded time."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from types import FrameType

from subnet_ft.errors import TaskError

# No exponents: `1e999999999` is a string, not a number worth expanding.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)


def compile_answer_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Compile `task.answer_pattern`; `None` stays `None`.

    Raises:
        TaskError: Not a regular expression, or not exactly one group.
    """
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise TaskError(
            f"task.answer_pattern {pattern!r} is not a regular expression: {error}. "
            "Write one such as '#### (-?[0-9,]+)'."
        ) from error
    if compiled.groups != 1:
        raise TaskError(
            f"task.answer_pattern {pattern!r} has {compiled.groups} groups, but exactly one must hold the answer. "
            "Put the answer in (...) and write any other group as (?:...)."
        )
    return compiled


def find_answer(pattern: re.Pattern[str] | None, text: str) -> str | None:
    """Return the answer that `text` gives, without surrounding white space; `None` when there is none.

    Args:
        pattern: One group; its first match anywhere in `text` counts. `None`: the whole text is the answer.
        text: A completion or a reference.

    Example:
        `find_answer(re.compile(r"#### (-?[0-9,]+)"), "5 + 9 = 14\\n#### 14")` is `"14"`.
    """
    if pattern is None:
        return text.strip() or None
    match = pattern.search(text)
    return (match[1] or "").strip() or None if match else None


def is_same_answer(answer: str, reference: str) -> bool:
    """Tell whether two answers are equal as text, or as numbers once commas are removed.

    Example:
        `"1,000"` equals `"1000.0"`; `"1e3"` does not, because it is not written as a decimal number.
    """
    if answer.strip() == reference.strip():
        return True
    numbers = [text.strip().replace(",", "") for text in (answer, reference)]
    return all(map(_NUMBER.fullmatch, numbers)) and Decimal(numbers[0]) == Decimal(numbers[1])


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` inside the block once it has run for `seconds`.

    Verifiers parse what a model wrote: `9**9**9` or a pattern that backtracks can take hours. The limit uses SIGALRM,
    so it holds only in the main thread of a POSIX system, which is where trainers call their rewards; elsewhere the
    block runs without one.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"stopped after {seconds} s")

    handler = signal.signal(signal.SIGALRM, expire)
    # It fires again after each interval, because some verifiers swallow the first exception in a bare `except`.
    outer = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        signal.signal(signal.SIGALRM, handler)
