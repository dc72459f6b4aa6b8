"""Completions sampled from the base model, scored once, and the data sets that are made of them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

from subnet_ft.errors import TaskError
from subnet_ft.tasks.generation import generate
from subnet_ft.tasks.task import Example, Prompt, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from subnet_ft.recipe import PairsSpec

logger = logging.getLogger(__name__)

MIN_YIELD = 0.1
"""Least share of prompts that must give a row: below it, one would train on a tenth of the data asked for."""
MIN_LABEL = 0.01
"""Least share of labelled completions that must be right, and that must be wrong."""


class Sample(TypedDict):
    """One completion, as it is trained on."""

    text: str
    right: bool
    answered: bool
    """Whether it gives an answer at all."""


class SampledPrompt(TypedDict):
    """A prompt with its completions, in the order in which they were sampled; plain data, as a stage stores it."""

    prompt: Prompt
    completions: list[Sample]


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    pairs: PairsSpec,
    *,
    seed: int,
    held_out: bool = False,
    progress: bool = False,
) -> list[SampledPrompt]:
    """Sample completions of the first `num_prompts` training prompts, or of all held-out ones, and score them.

    A completion is kept as sampled, except that what follows the line of its answer is dropped. The same arguments give
    the same completions.

    Raises:
        TaskError: Fewer training examples than `num_prompts`.
    """
    if not held_out and len(task.train) < pairs.num_prompts:
        raise TaskError(
            f"task.pairs.num_prompts is {pairs.num_prompts}, but the task has {len(task.train)} training examples. "
            "Raise task.num_train or lower task.pairs.num_prompts."
        )
    examples = task.evaluation if held_out else task.train[: pairs.num_prompts]
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
    return [
        {"prompt": example.prompt, "completions": [_score(task, example, text) for text in texts]}
        for example, texts in zip(examples, sampled, strict=True)
    ]


def preference_pairs(samples: list[SampledPrompt]) -> Dataset:
    """Pair the first right with the first wrong completion of each prompt; of the wrong ones, one with an answer first.

    A prompt whose samples are all right or all wrong gives no pair. The columns are TRL's preference format: `prompt`,
    `chosen`, `rejected`, as text or, for chat prompts, as messages.

    Raises:
        TaskError: Pairs for fewer than one prompt in ten.
    """
    from datasets import Dataset

    rows: list[dict[str, Any]] = []
    for sampled in samples:
        right = [sample for sample in sampled["completions"] if sample["right"]]
        wrong = [sample for sample in sampled["completions"] if not sample["right"]]
        # A stable sort: both groups stay in the order in which they were sampled.
        wrong.sort(key=lambda sample: not sample["answered"])
        if right and wrong:
            chosen, rejected = (_completion(sampled["prompt"], group[0]) for group in (right, wrong))
            rows.append({"prompt": sampled["prompt"], "chosen": chosen, "rejected": rejected})
    _check_yield(samples, len(rows), "pairs")
    return Dataset.from_list(rows)


def labelled_completions(samples: list[SampledPrompt], *, seed: int) -> Dataset:
    """Return every completion with its label, shuffled: TRL's KTO reads rows in order and compares neighbours.

    The columns are TRL's unpaired preference format: `prompt`, `completion`, `label`.

    Args:
        samples: From `sample_completions`.
        seed: Of the order.

    Raises:
        TaskError: Fewer than one completion in a hundred is right, or wrong.
    """
    from datasets import Dataset

    rows = [
        {"prompt": sampled["prompt"], "completion": _completion(sampled["prompt"], sample), "label": sample["right"]}
        for sampled in samples
        for sample in sampled["completions"]
    ]
    right = sum(row["label"] for row in rows)
    if min(right, len(rows) - right) < max(1, MIN_LABEL * len(rows)):
        raise TaskError(
            f"Of {len(rows)} sampled completions {right} are right; at least {MIN_LABEL:.0%} must be right, and as "
            f"many wrong. {_advice(harder=right > len(rows) - right)}"
        )
    logger.info("%d sampled completions, %d of them right", len(rows), right)
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows)


def right_completions(samples: list[SampledPrompt], *, max_right: int) -> Dataset:
    """Return the first `max_right` different right completions of each prompt: columns `prompt`, `completion`.

    Raises:
        TaskError: Right completions for fewer than one prompt in ten.
    """
    from datasets import Dataset

    rows: list[dict[str, Any]] = []
    num_prompts = 0
    for sampled in samples:
        texts = dict.fromkeys(sample["text"] for sample in sampled["completions"] if sample["right"])
        num_prompts += bool(texts)
        rows += [
            {"prompt": sampled["prompt"], "completion": as_messages(sampled["prompt"], text)}
            for text in list(texts)[:max_right]
        ]
    _check_yield(samples, num_prompts, "prompts with a right completion")
    return Dataset.from_list(rows)


def dataset_of_samples(samples: list[SampledPrompt], data: str, pairs: PairsSpec, *, seed: int) -> Dataset:
    """Return what an algorithm that learns from `data` reads of the samples.

    Raises:
        TaskError: Too few samples are of use.
    """
    build: dict[str, Callable[[], Dataset]] = {
        "preferences": lambda: preference_pairs(samples),
        "labelled": lambda: labelled_completions(samples, seed=seed),
        "samples": lambda: right_completions(samples, max_right=pairs.max_right or 1),
    }
    return build[data]()


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


def _score(task: Task, example: Example, completion: str) -> Sample:
    text = cut_after_answer(task, example, completion)
    right = task.is_correct(example, completion)
    return {"text": text, "right": right, "answered": task.answer_end(text) is not None}


def _completion(prompt: Prompt, sample: Sample) -> Any:
    return as_messages(prompt, sample["text"])


def as_messages(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """Return a completion in the form of its prompt: text, or one message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _check_yield(samples: list[SampledPrompt], found: int, what: str) -> None:
    def count(right: bool) -> int:
        return sum(all(sample["right"] is right for sample in sampled["completions"]) for sampled in samples)

    all_right, all_wrong = count(True), count(False)
    counts = f"{found} {what} from {len(samples)} prompts ({all_right} all right, {all_wrong} all wrong)"
    if found < MIN_YIELD * len(samples):
        raise TaskError(
            f"Sampling gave {counts}; at least {MIN_YIELD:.0%} of the prompts must give one. "
            f"{_advice(harder=all_right > all_wrong)}"
        )
    logger.info("%s", counts)


def _advice(*, harder: bool) -> str:
    return (
        f"Raise task.pairs.num_samples, or make the task {'harder' if harder else 'easier'} for this model "
        "(task.params, task.prompt, task.answer_pattern, task.pairs.max_new_tokens)."
    )
