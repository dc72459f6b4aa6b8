"""Preference pairs sampled from the base model: a right completion against a wrong one of the same prompt."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from subnet_ft.errors import TaskError
from subnet_ft.tasks.generation import generate
from subnet_ft.tasks.task import Example, Prompt, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from subnet_ft.recipe import PairsSpec

logger = logging.getLogger(__name__)

MIN_YIELD = 0.1
"""Least share of prompts that must give a pair: below it, one would train on a tenth of the data asked for."""


def sample_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    pairs: PairsSpec,
    *,
    seed: int,
    progress: bool = False,
) -> Dataset:
    """Sample the first `num_prompts` training prompts and pair the first right with the first wrong completion of each.

    A prompt whose samples are all right or all wrong gives no pair. A completion is kept as sampled, except that what
    follows the line of its answer is dropped; of the wrong ones, one that gives an answer is preferred. The columns are
    TRL's preference format: `prompt`, `chosen`, `rejected`, as text or, for chat prompts, as messages. The same
    arguments give the same pairs.

    Raises:
        TaskError: Fewer training examples than `num_prompts`, or pairs for fewer than one prompt in ten.
    """
    from datasets import Dataset

    if len(task.train) < pairs.num_prompts:
        raise TaskError(
            f"task.pairs.num_prompts is {pairs.num_prompts}, but the task has {len(task.train)} training examples. "
            "Raise task.num_train or lower task.pairs.num_prompts."
        )
    examples = task.train[: pairs.num_prompts]
    sampled = generate(
        model,
        tokenizer,
        [example.prompt for example in examples],
        max_new_tokens=pairs.max_new_tokens,
        temperature=pairs.temperature,
        num_samples=pairs.num_samples,
        batch_size=pairs.batch_size,
        seed=seed,
        progress=progress,
    )
    rows: list[dict[str, Any]] = []
    all_right = all_wrong = 0
    for example, completions in zip(examples, sampled, strict=True):
        right, wrong = _split(task, example, completions)
        all_right += not wrong
        all_wrong += not right
        if right and wrong:
            rows.append(_to_row(example.prompt, right[0], wrong[0]))
    counts = f"{len(rows)} pairs from {len(examples)} prompts ({all_right} all right, {all_wrong} all wrong)"
    if len(rows) < MIN_YIELD * len(examples):
        raise TaskError(
            f"Sampling {pairs.num_samples} completions per prompt of `{task.name}` gave {counts}; at least "
            f"{MIN_YIELD:.0%} of the prompts must give one. Raise task.pairs.num_samples, or make the task "
            f"{'easier' if all_wrong >= all_right else 'harder'} for this model (task.params, task.prompt, "
            "task.answer_pattern, task.pairs.max_new_tokens)."
        )
    logger.info("sampled %s", counts)
    return Dataset.from_list(rows)


def cut_after_answer(task: Task, example: Example, completion: str) -> str:
    """Drop what follows the line of the answer, unless that would change the score.

    Example:
        With the pattern `(-?[0-9]+)`, `" 45\\n71 - 26 = 45"` becomes `" 45"`.
    """
    end = task.answer_end(completion)
    if end is None:
        return completion
    cut = completion[:end] + completion[end:].partition("\n")[0]
    return cut if task.score(example, cut) == task.score(example, completion) else completion


def _split(task: Task, example: Example, completions: list[str]) -> tuple[list[str], list[str]]:
    right: list[str] = []
    wrong: list[str] = []
    for completion in completions:
        (right if task.is_correct(example, completion) else wrong).append(cut_after_answer(task, example, completion))
    # A stable sort: those with an answer first, both groups in the order in which they were sampled.
    wrong.sort(key=lambda text: task.answer_end(text) is None)
    return right, wrong


def _to_row(prompt: Prompt, chosen: str, rejected: str) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    texts = {"chosen": chosen, "rejected": rejected}
    return {"prompt": prompt, **{name: [{"role": "assistant", "content": text}] for name, text in texts.items()}}
