"""Greedy answers of a model to the held-out prompts of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from subnet_ft.errors import TaskError
from subnet_ft.tasks.generation import generate
from subnet_ft.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Answer every held-out prompt greedily and score the answers.

    Args:
        model: The model to judge; its mode and the random state are left as they were.
        tokenizer: Its tokenizer.
        task: Its `evaluation` examples are used.
        max_new_tokens: Longest answer; one that is cut off here is scored as it stands.
        batch_size: Prompts answered at a time.
        progress: Show a bar on stderr.

    Returns:
        One record per example, in the task's order: `prompt`, `completion`, `answer` (the reference), `score` in [0, 1]
        and `correct`. The lists of two models for one task can be compared pair by pair.

    Raises:
        TaskError: The task has no held-out examples.
    """
    if not task.evaluation:
        raise TaskError(f"The task `{task.name}` has no held-out examples. Set task.num_eval above 0.")
    completions = generate(
        model,
        tokenizer,
        [example.prompt for example in task.evaluation],
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        batch_size=batch_size,
        seed=0,
        progress=progress,
    )
    records = []
    for example, (completion,) in zip(task.evaluation, completions, strict=True):
        score = task.score(example, completion)
        records.append(
            {
                "prompt": example.prompt,
                "completion": completion,
                "answer": example.answer,
                "score": score,
                "correct": score >= 1.0,
            }
        )
    return records
