"""Output-level agreement of a run with the full run, on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from subnet_ft.evidence.output_distance import KlDifference, Text, kl_difference, mean_with_interval, output_distances
from subnet_ft.evidence.statistics import wilson_interval
from subnet_ft.tasks.answers import is_same_answer
from subnet_ft.tasks.generation import prompt_tokens
from subnet_ft.tasks.task import Prompt, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Agreement:
    """How like the full run's a model's outputs are; intervals resample prompts."""

    kl: float
    """Mean KL(full || model) per token, in nats, over the full run's greedy completions and what follows them."""
    kl_low: float | None
    """Lower end of its bootstrap interval; `None` with one prompt."""
    kl_high: float | None
    """Upper end, likewise."""
    same_token: float
    """Share of these positions at which both have the same likeliest token."""
    num_tokens: int
    """Positions compared."""
    same_completion: float
    """Share of prompts whose greedy completions are the same text."""
    same_low: float
    """Lower end of its Wilson interval."""
    same_high: float
    """Upper end."""
    num_prompts: int
    """Held-out prompts."""
    confidence: float
    """Two-sided confidence of the intervals."""
    kl_by_prompt: list[float] = field(default_factory=list)
    """Prompt by prompt, the sum of the KL over its positions, so that two models can be compared."""
    tokens_by_prompt: list[int] = field(default_factory=list)
    """Prompt by prompt, its positions."""
    same_answer: float | None = None
    """Share of prompts to which both give the same answer, right or wrong, or both none; `None` without a task."""
    same_answer_low: float | None = None
    """Lower end of its Wilson interval."""
    same_answer_high: float | None = None
    """Upper end."""


def agreement(
    full: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    own: Sequence[str],
    *,
    task: Task | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> Agreement:
    """Compare a model with the full run where the full run goes: on its greedy completions.

    Args:
        full: The full run.
        model: The model to compare.
        tokenizer: Of both.
        prompts: Held-out prompts.
        completions: The full run's greedy completions, one per prompt.
        own: The model's, likewise.
        task: Finds the answer in a completion.
        confidence: Of the intervals, in (0, 1).
        seed: Of the bootstrap.
        progress: Show a bar on stderr.

    Raises:
        ValueError: There are no prompts, or not one completion of each model per prompt.
    """
    if not len(prompts) == len(completions) == len(own) > 0:
        raise ValueError(
            f"Agreement needs one completion of each model per prompt, got {len(prompts)} prompts, {len(completions)} "
            f"and {len(own)} completions."
        )
    texts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        before = prompt_tokens(tokenizer, prompt)
        after: Any = tokenizer(completion, add_special_tokens=False)["input_ids"] if completion else []
        texts.append(Text([*before, *after], len(before) - 1))
    found = output_distances(full, model, texts, progress=progress)
    counts = np.array([entry.num_tokens for entry in found], dtype=np.float64)
    kl, low, high = mean_with_interval(
        np.array([entry.kl for entry in found]), counts, confidence=confidence, seed=seed
    )
    same = sum(first == second for first, second in zip(completions, own, strict=True))
    same_low, same_high = wilson_interval(same, len(prompts), confidence)
    return Agreement(
        kl=kl,
        kl_low=low,
        kl_high=high,
        same_token=sum(entry.same for entry in found) / float(counts.sum()),
        num_tokens=int(counts.sum()),
        same_completion=same / len(prompts),
        same_low=same_low,
        same_high=same_high,
        num_prompts=len(prompts),
        confidence=confidence,
        kl_by_prompt=[entry.kl for entry in found],
        tokens_by_prompt=[entry.num_tokens for entry in found],
        **({} if task is None else _same_answers(task, completions, own, confidence)),
    )


def _same_answers(task: Task, first: Sequence[str], second: Sequence[str], confidence: float) -> dict[str, float]:
    same = 0
    for one, other in zip(first, second, strict=True):
        ours, theirs = task.answer_in(one), task.answer_in(other)
        same += ours is theirs is None or (ours is not None and theirs is not None and is_same_answer(ours, theirs))
    low, high = wilson_interval(same, len(first), confidence)
    return {"same_answer": same / len(first), "same_answer_low": low, "same_answer_high": high}


def agreement_differences(
    found: Mapping[str, Agreement], pairs: Sequence[tuple[str, str]], *, seed: int = 0
) -> list[KlDifference]:
    """Compare how far models lie from the full run, on the same completions of the full run.

    Args:
        found: Name to its agreement with the full run.
        pairs: First and second model.
        seed: Of the bootstrap.
    """
    return [
        kl_difference(
            (first, found[first].kl_by_prompt),
            (second, found[second].kl_by_prompt),
            found[first].tokens_by_prompt,
            confidence=found[first].confidence,
            seed=seed,
        )
        for first, second in pairs
    ]
