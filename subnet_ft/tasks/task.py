"""What a task is: prompts with known answers, and the score of a completion."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from subnet_ft.tasks.answers import find_answer, time_limit

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, str]]
"""Text as it is, or chat messages (`role`, `content`) that the model's chat template renders."""

SCORE_SECONDS = 2.0
"""Longest time to score one completion; a verifier takes microseconds unless it is fed something pathological."""

_FAILURES_SEEN: set[tuple[str, type[Exception]]] = set()


@dataclass(frozen=True)
class Example:
    """One prompt with its reference answer."""

    prompt: Prompt
    """What the model is given."""

    answer: str
    """The reference answer, as the verifier expects it; empty when the task's verifier needs none."""

    fields: dict[str, Any] = field(default_factory=dict)
    """What the example was made from: the reasoning-gym entry, or the dataset's row. Plain data."""


@dataclass(frozen=True)
class Task:
    """Training and held-out examples and their verifier; no prompt occurs twice, neither within nor across the two."""

    name: str
    """The task's name in the recipe."""

    train: list[Example]
    """Examples to learn from."""

    evaluation: list[Example]
    """Held-out examples."""

    verifier: Callable[[Example, str], float]
    """Scores an extracted, non-empty answer; 1 is fully right. What it raises counts as 0."""

    answer_pattern: re.Pattern[str] | None = None
    """Finds the answer in a completion; `None`: the whole stripped text."""

    def score(self, example: Example, completion: str) -> float:
        """Score `completion` in [0, 1]; 0 when it holds no answer or the verifier cannot make sense of it."""
        return self._score(example, completion, self.answer_pattern)

    def score_answer(self, example: Example, answer: str) -> float:
        """Score an answer that was found already, by whatever pattern, as `score` does."""
        return self._score(example, answer, None)

    def _score(self, example: Example, completion: str, pattern: re.Pattern[str] | None) -> float:
        try:
            with time_limit(SCORE_SECONDS):
                answer = find_answer(pattern, completion)
                score = 0.0 if answer is None else float(self.verifier(example, answer))
        except TimeoutError:
            logger.warning("%s: scoring took over %g s and counts as 0: %.80r", self.name, SCORE_SECONDS, completion)
            return 0.0
        except Exception as error:  # a verifier parses what a model wrote and may fail in any way
            # Once aloud for each kind of failure: a verifier that always fails would otherwise pass for a weak model.
            seen = (self.name, type(error))
            level = logging.DEBUG if seen in _FAILURES_SEEN else logging.WARNING
            _FAILURES_SEEN.add(seen)
            logger.log(level, "%s: the verifier failed on %.80r, which counts as 0: %r", self.name, completion, error)
            return 0.0
        return min(max(score, 0.0), 1.0)

    def answer_end(self, completion: str) -> int | None:
        """Return where the answer that `answer_pattern` finds ends, or `None` when there is no pattern or no match."""
        if self.answer_pattern is None:
            return None
        try:
            with time_limit(SCORE_SECONDS):
                match = self.answer_pattern.search(completion)
        except TimeoutError:
            return None
        return match.end(1) if match and match[1] is not None else None

    def answer_in(self, completion: str) -> str | None:
        """Return the answer that `completion` gives; `None` when it holds none, or finding it takes too long."""
        try:
            with time_limit(SCORE_SECONDS):
                return find_answer(self.answer_pattern, completion)
        except TimeoutError:
            return None

    def is_correct(self, example: Example, completion: str) -> bool:
        """Tell whether `completion` gets the full score."""
        return self.score(example, completion) >= 1.0
