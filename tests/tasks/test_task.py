"""A score is in [0, 1] whatever a verifier does with what a model wrote."""

from __future__ import annotations

import logging
import re
import time

import pytest

from subnet_ft.tasks import task as task_module
from subnet_ft.tasks.task import Example, Task

EXAMPLE = Example("5 + 9 =", "14")


def _fail(example: Example, answer: str) -> float:
    raise ValueError(answer)


@pytest.mark.parametrize(("value", "score"), [(0.25, 0.25), (1, 1.0), (7.0, 1.0), (-1.0, 0.0)])
def test_score_stays_between_0_and_1(value: float, score: float) -> None:
    task = Task("t", [], [], lambda example, answer: value)
    assert task.score(EXAMPLE, "14") == score
    assert task.is_correct(EXAMPLE, "14") is (score == 1.0)


def test_score_of_a_failing_verifier_is_0() -> None:
    assert Task("t", [], [], _fail).score(EXAMPLE, "14") == 0.0


def test_score_says_once_aloud_that_a_verifier_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(task_module, "_FAILURES_SEEN", set())
    task = Task("t", [], [], _fail)
    for completion in ("14", "15"):
        task.score(EXAMPLE, completion)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the verifier failed on '14', which counts as 0" in record.getMessage()


def test_score_without_an_answer_does_not_ask_the_verifier() -> None:
    asked: list[str] = []
    task = Task("t", [], [], lambda example, answer: asked.append(answer) or 1.0, re.compile(r"#### (\d+)"))
    assert task.score(EXAMPLE, "14") == 0.0
    assert task.score(EXAMPLE, "#### 14") == 1.0
    assert asked == ["14"]


def test_score_of_a_verifier_that_hangs_is_0(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(task_module, "SCORE_SECONDS", 0.1)

    def hang(example: Example, answer: str) -> float:
        time.sleep(5)
        return 1.0

    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert Task("t", [], [], hang).score(EXAMPLE, "9**9**9") == 0.0
    assert time.monotonic() - start < 3
    assert "counts as 0" in caplog.text


def test_answer_end_is_where_the_group_ends() -> None:
    task = Task("t", [], [], _fail, re.compile(r"= (\d+)\."))
    assert task.answer_end("a = 14. b") == 6
    assert task.answer_end("a") is None
    assert Task("t", [], [], _fail).answer_end("14") is None


def test_score_answer_needs_no_pattern_to_find_it() -> None:
    task = Task("t", [], [], lambda example, answer: float(answer == example.answer), re.compile("#### ([0-9]+)"))
    assert task.score(EXAMPLE, "14") == 0.0
    assert task.score_answer(EXAMPLE, " 14 ") == 1.0
    assert task.score_answer(EXAMPLE, "15") == 0.0
    assert Task("t", [], [], _fail).score_answer(EXAMPLE, "14") == 0.0
