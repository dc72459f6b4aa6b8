"""Retention: what a model keeps of its base, on tasks that were not trained and on neutral text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from subnet_ft.errors import TaskError
from subnet_ft.evidence.accuracy import evaluate_model
from subnet_ft.evidence.output_distance import (
    KlDifference,
    Text,
    TextDistance,
    kl_difference,
    mean_with_interval,
    output_distances,
)
from subnet_ft.evidence.statistics import paired_difference, wilson_interval
from subnet_ft.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskRetention:
    """Accuracy on one task that was not trained."""

    accuracy: float
    """Share of prompts answered correctly."""
    low: float
    """Lower end of its Wilson interval."""
    high: float
    """Upper end."""
    correct: list[bool]
    """Prompt by prompt, so that two models can be compared."""


@dataclass(frozen=True)
class Retention:
    """What one model keeps."""

    tasks: dict[str, TaskRetention]
    """By the task's name."""
    kl_to_base: float | None
    """Mean KL(base || model) per token of neutral text, in nats; `None` for the base."""
    kl_low: float | None
    """Lower end of its interval, by a bootstrap over paragraphs; `None` with one paragraph, too."""
    kl_high: float | None
    """Upper end, likewise."""
    num_tokens: int
    """Tokens of neutral text."""
    confidence: float
    """Two-sided confidence of the intervals."""
    kl_by_paragraph: list[float] = field(default_factory=list)
    """Paragraph by paragraph, the sum of the KL over its tokens, to compare two models by; empty for the base."""
    tokens_by_paragraph: list[int] = field(default_factory=list)
    """Paragraph by paragraph, its tokens."""


@dataclass(frozen=True)
class RetentionDifference:
    """Accuracy of `first` minus accuracy of `second` on the prompts of a task that was not trained."""

    first: str
    second: str
    task: str
    difference: float
    low: float
    """Lower end of Tango's interval."""
    high: float
    """Upper end."""
    confidence: float = field(default=0.95)


def retention(
    base: PreTrainedModel,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Task],
    paragraphs: Sequence[str],
    *,
    max_new_tokens: int,
    max_tokens: int,
    batch_size: int,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> Retention:
    """Judge a model on what it was not trained for.

    Args:
        base: The base model.
        model: The model to judge; `None` judges the base.
        tokenizer: Of both.
        tasks: Name to task; the held-out prompts are used.
        paragraphs: Neutral text.
        max_new_tokens: Longest answer.
        max_tokens: Tokens of neutral text that are read, from the first on.
        batch_size: Prompts answered at a time.
        confidence: Of the intervals, in (0, 1).
        seed: Of the bootstrap.
        progress: Show bars on stderr.
    """
    judged = base if model is None else model
    found = {}
    for name, task in tasks.items():
        records = evaluate_model(
            judged, tokenizer, task, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
        )
        correct = [bool(record["correct"]) for record in records]
        low, high = wilson_interval(sum(correct), len(correct), confidence)
        found[name] = TaskRetention(sum(correct) / len(correct), low, high, correct)
    texts = _texts(tokenizer, paragraphs, max_tokens)
    kl: tuple[float | None, float | None, float | None] = (None, None, None)
    distances: list[TextDistance] = []
    if model is not None and texts:
        distances = output_distances(base, model, texts, progress=progress)
        kl = mean_with_interval(
            np.array([entry.kl for entry in distances]),
            np.array([entry.num_tokens for entry in distances], dtype=np.float64),
            confidence=confidence,
            seed=seed,
        )
    return Retention(
        tasks=found,
        kl_to_base=kl[0],
        kl_low=kl[1],
        kl_high=kl[2],
        num_tokens=sum(len(text.tokens) for text in texts),
        confidence=confidence,
        kl_by_paragraph=[entry.kl for entry in distances],
        tokens_by_paragraph=[len(text.tokens) for text in texts],
    )


def retention_differences(
    found: Mapping[str, Retention], pairs: Sequence[tuple[str, str]], *, confidence: float
) -> list[RetentionDifference]:
    """Compare models on the same prompts, task by task.

    Args:
        found: Name to what the model keeps.
        pairs: First and second model.
        confidence: Of the intervals.
    """
    differences = []
    for first, second in pairs:
        for task, ours in found[first].tasks.items():
            paired = paired_difference(ours.correct, found[second].tasks[task].correct, confidence=confidence)
            differences.append(
                RetentionDifference(first, second, task, paired.difference, paired.low, paired.high, confidence)
            )
    return differences


def text_differences(
    found: Mapping[str, Retention], pairs: Sequence[tuple[str, str]], *, seed: int = 0
) -> list[KlDifference]:
    """Compare how far models moved from the base on the same neutral text.

    Args:
        found: Name to what the model keeps; the base itself has not moved and cannot be compared.
        pairs: First and second model.
        seed: Of the bootstrap.
    """
    return [
        kl_difference(
            (first, found[first].kl_by_paragraph),
            (second, found[second].kl_by_paragraph),
            found[first].tokens_by_paragraph,
            confidence=found[first].confidence,
            seed=seed,
        )
        for first, second in pairs
    ]


def read_paragraphs(path: str | Path | None) -> list[str]:
    """Return the paragraphs of a text file, or of the text that comes with subnet-ft.

    Raises:
        TaskError: The file cannot be read, or holds nothing.
    """
    if path is None:
        text = files("subnet_ft.evidence").joinpath("neutral_text.txt").read_text(encoding="utf-8")
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(
                f"The neutral text `{path}` cannot be read: {error}. Check evaluation.retention.text."
            ) from error
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]
    if not paragraphs:
        raise TaskError(f"The neutral text `{path}` is empty. Check evaluation.retention.text.")
    return paragraphs


def _texts(tokenizer: Any, paragraphs: Sequence[str], max_tokens: int) -> list[Text]:
    """Return the first paragraphs as tokens, `max_tokens` in all at most."""
    texts: list[Text] = []
    left = max_tokens
    for paragraph in paragraphs:
        tokens = tokenizer(paragraph)["input_ids"][:left]
        if tokens:
            texts.append(Text(list(tokens), 0))
        left -= len(tokens)
        if left == 0:
            break
    return texts
