"""Rationales that a teacher writes: what it is asked, what is found in its texts, and the rows that are made of it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from subnet_ft.errors import TaskError
from subnet_ft.tasks.answers import compile_answer_pattern, find_answer, time_limit
from subnet_ft.tasks.generation import generate
from subnet_ft.tasks.procedural import PREFIX, template_fields
from subnet_ft.tasks.prompts import build_prompt, render_template
from subnet_ft.tasks.samples import MIN_YIELD, as_messages
from subnet_ft.tasks.task import SCORE_SECONDS, Example, Prompt, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from subnet_ft.recipe import RationalesSpec, TaskSpec

logger = logging.getLogger(__name__)


class Explained(NamedTuple):
    """What a teacher's text says."""

    rationale: str
    answer: str


def with_prefix(task: Task, prefix: str) -> Task:
    """Return the task with `prefix` before every held-out prompt."""
    held_out = [dataclasses.replace(one, prompt=put_before(prefix, one.prompt)) for one in task.evaluation]
    return dataclasses.replace(task, evaluation=held_out)


def put_before(prefix: str, prompt: Prompt) -> Prompt:
    """Return a prompt with `prefix` before its text, or before the last message of the user.

    Example:
        `put_before("[label] ", "5 + 9 =")` is `"[label] 5 + 9 ="`.
    """
    if isinstance(prompt, str):
        return prefix + prompt
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        raise TaskError(f"The prompt {prompt!r:.200} has no message of the user that {prefix!r} could stand before.")
    message = {**prompt[last], "content": prefix + prompt[last]["content"]}
    return [*prompt[:last], message, *prompt[last + 1 :]]


def teacher_prompts(task: Task, spec: TaskSpec) -> list[Prompt]:
    """Return what the teacher is given for the first `num_prompts` training examples.

    Raises:
        TaskError: Fewer training examples than that, or a template that cannot be filled.
    """
    rationales = _spec_of(spec)
    if len(task.train) < rationales.num_prompts:
        raise TaskError(
            f"task.rationales.num_prompts is {rationales.num_prompts}, but the task has {len(task.train)} training "
            "examples. Raise task.num_train or lower task.rationales.num_prompts."
        )
    asked = dataclasses.replace(spec, prompt=rationales.prompt, chat=rationales.chat, system_prompt=None)
    return [
        build_prompt(asked, _fields(example, spec), default="prompt", where="task.rationales.prompt, as task.prompt")
        for example in task.train[: rationales.num_prompts]
    ]


def write_rationales(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    spec: RationalesSpec,
    *,
    seed: int,
    progress: bool = False,
) -> list[str]:
    """Let the teacher write one text for each of its prompts, in their order."""
    texts = generate(
        teacher,
        tokenizer,
        prompts,
        max_new_tokens=spec.max_new_tokens,
        temperature=spec.temperature,
        batch_size=spec.batch_size,
        seed=seed,
        progress=progress,
    )
    return [text for (text,) in texts]


def find_rationale(text: str, spec: TaskSpec) -> Explained | None:
    """Find the rationale and the answer in a teacher's text; `None` unless it has both.

    Example:
        With the answer pattern `so (-?[0-9]+)`, `"5 and 9 make 14, so 14"` is `("5 and 9 make 14,", "14")`.
    """
    rationales = _spec_of(spec)
    pattern = compile_answer_pattern(rationales.answer_pattern or spec.answer_pattern)
    own = compile_answer_pattern(rationales.rationale_pattern)
    try:
        with time_limit(SCORE_SECONDS):
            answer = find_answer(pattern, text)
            match = None if pattern is None else pattern.search(text)
            rationale = text[: match.start()].strip() if own is None and match else find_answer(own, text)
    except TimeoutError:
        logger.warning("searching a rationale took over %g s, which counts as none: %.80r", SCORE_SECONDS, text)
        return None
    return Explained(rationale, answer) if rationale and answer else None


def rationale_dataset(task: Task, spec: TaskSpec, texts: Sequence[str]) -> Dataset:
    """Return two rows for every text that is kept: the teacher's answer and its rationale, each after its prefix.

    Args:
        task: Its first training examples are those that the teacher explained.
        spec: The recipe's `task`.
        texts: What the teacher wrote, in order.

    Returns:
        Columns `prompt`, `completion` and `is_rationale`, the two rows of an example one after the other.

    Raises:
        TaskError: Fewer than one text in ten is kept.
    """
    from datasets import Dataset

    rationales = _spec_of(spec)
    rows: list[dict[str, Any]] = []
    found = right = 0
    for example, text in zip(task.train, texts, strict=False):
        explained = find_rationale(text, spec)
        found += explained is not None
        is_right = explained is not None and task.score_answer(example, explained.answer) >= 1.0
        right += is_right
        if explained is None or (rationales.keep == "right" and not is_right):
            continue
        fields = {**_fields(example, spec), "answer": explained.answer, "rationale": explained.rationale}
        label = render_template(spec.completion or "{answer}", fields, key="task.completion")
        rationale = render_template(rationales.completion or "{rationale}", fields, key="task.rationales.completion")
        prefixes = (rationales.label_prefix, label, False), (rationales.rationale_prefix, rationale, True)
        for prefix, completion, is_rationale in prefixes:
            prompt = put_before(prefix, example.prompt)
            rows.append({"prompt": prompt, "completion": as_messages(prompt, completion), "is_rationale": is_rationale})
    counts = f"{len(texts)} texts of the teacher: {found} with a rationale and an answer, {right} of them right"
    if len(rows) // 2 < MIN_YIELD * len(texts):
        raise TaskError(
            f"Of {counts}; at least {MIN_YIELD:.0%} must be kept under `keep: {rationales.keep}`. Look at what the "
            "teacher writes (`rationales.json` in the run's folder), and change task.rationales (prompt, "
            "answer_pattern, max_new_tokens, keep) or the teacher."
        )
    logger.info("%s, %d kept", counts, len(rows) // 2)
    return Dataset.from_list(rows)


def _spec_of(spec: TaskSpec) -> RationalesSpec:
    assert spec.rationales is not None  # the recipe was checked
    return spec.rationales


def _fields(example: Example, spec: TaskSpec) -> dict[str, Any]:
    return template_fields(example.fields) if spec.name.startswith(PREFIX) else example.fields
