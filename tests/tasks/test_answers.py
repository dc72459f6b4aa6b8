"""Answers are found, compared and bounded in time as their docstrings say."""

from __future__ import annotations

import re
import signal
import threading
import time

import pytest

from subnet_ft.errors import TaskError
from subnet_ft.tasks.answers import compile_answer_pattern, find_answer, is_same_answer, time_limit

GSM8K = r"#### (-?[\d,]+)"


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (GSM8K, "5 + 9 = 14\n#### 14", "14"),
        (GSM8K, "#### 1,000\n#### 2", "1,000"),
        (GSM8K, "14", None),
        (None, "  14 \n", "14"),
        (None, " \n ", None),
        (r"= ?(\d*)", "5 + 9 = ", None),
        (r"a|(b)", "a", None),
    ],
)
def test_find_answer_takes_the_first_match(pattern: str | None, text: str, answer: str | None) -> None:
    assert find_answer(compile_answer_pattern(pattern), text) == answer


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("1,000", "1000.0", True),
        (" 14 ", "14", True),
        ("014", "14", True),
        ("-7", "+7", False),
        ("1e3", "1000", False),
        ("nan", "nan", True),
        ("nan", "NaN", False),
        ("1,2", "12", True),
        ("x", "y", False),
        (".5", "0.50", True),
    ],
)
def test_is_same_answer_compares_text_then_numbers(answer: str, reference: str, same: bool) -> None:
    assert is_same_answer(answer, reference) is same


def test_compile_answer_pattern_explains_what_is_wrong() -> None:
    with pytest.raises(TaskError, match="2 groups, but exactly one"):
        compile_answer_pattern(r"(a)(b)")
    with pytest.raises(TaskError, match="0 groups"):
        compile_answer_pattern("a")
    with pytest.raises(TaskError, match="is not a regular expression"):
        compile_answer_pattern("(")


def test_time_limit_stops_a_pattern_that_backtracks_and_restores_the_alarm() -> None:
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    with pytest.raises(TimeoutError), time_limit(0.2):
        re.search(r"(a+)+b", "a" * 40)
    assert time.monotonic() - start < 5
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_time_limit_leaves_other_threads_alone() -> None:
    done: list[bool] = []

    def work() -> None:
        with time_limit(0.01):
            time.sleep(0.05)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
