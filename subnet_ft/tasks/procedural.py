"""Tasks drawn from reasoning-gym's procedural generators: `reasoning_gym/NAME`."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from subnet_ft.errors import MissingDependencyError, TaskError
from subnet_ft.tasks.answers import compile_answer_pattern, time_limit
from subnet_ft.tasks.prompts import build_prompt, did_you_mean, prompt_key
from subnet_ft.tasks.task import Example, Task

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

    from subnet_ft.recipe import TaskSpec

PREFIX = "reasoning_gym/"

# Some generators prepare all their entries when they are built, so examples are drawn from blocks of this size.
_BLOCK = 1024

DRAW_SECONDS = 60.0
"""Longest time to draw one example; most take microseconds, and params that cannot be satisfied take for ever."""


def load_procedural_task(spec: TaskSpec, *, seed: int, exclude: Collection[str] = ()) -> Task:
    """Draw `num_eval` held-out and `num_train` training examples with different prompts.

    The two are a random split of one draw: easy prompts repeat and run out first, so taking one set after the other
    would leave most of them in the first. Drawing stops when ten times as many draws in a row repeat a prompt as there
    are prompts, because then next to none are left.

    Prompts whose key is in `exclude` are passed over.

    Prompt templates see `question`, `answer` and the entry's metadata, such as `expression` of `chain_sum`. The answer
    found in a completion is judged by the dataset's own `score_answer`.

    Raises:
        TaskError: Unknown dataset or parameters, values that the dataset refuses, or too few different prompts.
        MissingDependencyError: reasoning-gym is not installed.
    """
    pattern = compile_answer_pattern(spec.answer_pattern)
    blocks = _Blocks(spec, seed)
    wanted = spec.num_eval + spec.num_train
    found: dict[str, Example] = {}
    repeats = draws = 0
    for entry in blocks.entries():
        if len(found) == wanted or repeats > 10 * (len(found) + len(exclude)) + 100:
            break
        draws += 1
        example = _to_example(spec, entry)
        key = prompt_key(example.prompt)
        if key in found or key in exclude:
            repeats += 1
        else:
            repeats = 0
            found[key] = example
    if len(found) < wanted:
        beside = " beside the training prompts" if exclude else ""
        raise TaskError(
            f"`{spec.name}` gave only {len(found)} different prompts{beside} in {draws} draws, but num_eval + "
            f"num_train = {spec.num_eval} + {spec.num_train} = {wanted} are asked for. Ask for fewer, widen "
            f"task.params (now {spec.params}), or let task.prompt show more of an example."
        )
    examples = list(found.values())
    random.Random(seed).shuffle(examples)
    judge = blocks.first

    def verify(example: Example, answer: str) -> float:
        return float(judge.score_answer(answer, example.fields))

    return Task(spec.name, examples[spec.num_eval :], examples[: spec.num_eval], verify, pattern)


def template_fields(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what templates see of an entry: its metadata, `question` and `answer`."""
    answer = "" if entry["answer"] is None else str(entry["answer"])
    return {**entry["metadata"], "question": entry["question"], "answer": answer}


def _to_example(spec: TaskSpec, entry: dict[str, Any]) -> Example:
    fields = template_fields(entry)
    return Example(build_prompt(spec, fields, default="question", where=spec.name), fields["answer"], entry)


class _Blocks:
    """An endless stream of entries: datasets of `_BLOCK` entries, each with its own seed."""

    def __init__(self, spec: TaskSpec, seed: int) -> None:
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise MissingDependencyError("reasoning_gym", f"for the task `{spec.name}`", "tasks") from error
        self.spec, self.seed = spec, seed
        name = spec.name.removeprefix(PREFIX)
        if name not in DATASETS:
            raise TaskError(
                f"reasoning-gym has no dataset `{name}`.{did_you_mean(name, DATASETS)} It has {len(DATASETS)}; list "
                'them with `python -c "from reasoning_gym.factory import DATASETS; print(*sorted(DATASETS))"`.'
            )
        self.dataset_class, self.config_class = DATASETS[name]
        self._check_names()
        self.first = self._build(0)

    def entries(self) -> Iterator[dict[str, Any]]:
        for block in itertools.count():
            dataset = self.first if block == 0 else self._build(block)
            for index in range(_BLOCK):
                try:
                    with time_limit(DRAW_SECONDS):
                        entry = dataset[index]
                except IndexError:  # `word_ladder` ends a block early
                    if index == 0:
                        return
                    break
                except Exception as error:
                    raise TaskError(
                        f"`{self.spec.name}` failed to draw an example with task.params {self.spec.params}: {error!r}. "
                        "Try other params; these may be impossible to satisfy."
                    ) from error
                yield entry

    def _check_names(self) -> None:
        known = {field.name for field in dataclasses.fields(self.config_class)}
        own = {"seed", "size"} & set(self.spec.params)
        if own:
            raise TaskError(
                f"task.params of `{self.spec.name}` sets {', '.join(sorted(own))}. Leave them out: the recipe's seed, "
                "num_train and num_eval decide them."
            )
        problems = [f"`{name}`.{did_you_mean(name, known)}" for name in self.spec.params if name not in known]
        if problems:
            raise TaskError(
                f"task.params of `{self.spec.name}` has no {' no '.join(problems)} "
                f"It takes {', '.join(sorted(known - {'seed', 'size'}))}."
            )

    def _build(self, block: int) -> ProceduralDataset:
        # Entry i of a reasoning-gym dataset is drawn from Random(seed + i): neighbouring seeds would share entries.
        digest = hashlib.sha256(f"{self.spec.name}/{self.seed}/{block}".encode()).digest()
        try:
            config = self.config_class(**self.spec.params, seed=int.from_bytes(digest[:4], "big") >> 1, size=_BLOCK)
            if hasattr(config, "validate"):
                config.validate()
            dataset: ProceduralDataset = self.dataset_class(config=config)
        except Exception as error:  # asserts, type errors and others: each dataset checks in its own way
            raise TaskError(
                f"`{self.spec.name}` refuses task.params {self.spec.params}: {str(error) or repr(error)}. "
                "Correct the values; names and defaults are those of reasoning-gym's config."
            ) from error
        return dataset
