"""Tasks made from a dataset on the Hub or on disk: the task `dataset`."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subnet_ft.errors import TaskError
from subnet_ft.tasks.answers import compile_answer_pattern, find_answer, is_same_answer
from subnet_ft.tasks.prompts import build_prompt, prompt_key, render_template
from subnet_ft.tasks.task import Example, Task

if TYPE_CHECKING:
    import re

    from datasets import Dataset

    from subnet_ft.recipe import DatasetSpec, TaskSpec

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_hub_task(spec: TaskSpec, *, seed: int, exclude: Collection[str] = ()) -> Task:
    """Read `num_eval` held-out and `num_train` training examples with different prompts, in an order set by `seed`.

    Prompts whose key is in `exclude` are passed over. Templates see the columns of a row. The reference is the template
    `task.answer` or the column `answer`, else `completion`, and `task.answer_pattern` has to find the answer in it. A
    completion is right when its answer equals the reference as text, or as a number without commas.

    Raises:
        TaskError: Data that cannot be read, missing columns, a reference without an answer, or too few rows.
    """
    dataset = require_dataset(spec)
    pattern = compile_answer_pattern(spec.answer_pattern)
    seen = set(exclude)
    evaluation = _take(spec, dataset.eval_split, spec.num_eval, pattern, seen, seed=seed, key="num_eval")
    train = _take(spec, dataset.train_split, spec.num_train, pattern, seen, seed=seed, key="num_train")

    def verify(example: Example, answer: str) -> float:
        return float(is_same_answer(answer, example.answer))

    return Task(spec.name, train, evaluation, verify, pattern)


def require_dataset(spec: TaskSpec) -> DatasetSpec:
    """Return `spec.dataset`.

    Raises:
        TaskError: There is none.
    """
    if spec.dataset is None:
        raise TaskError("The task `dataset` needs data. Set task.dataset.path to a Hub id, a folder or a file.")
    return spec.dataset


def read_split(dataset: DatasetSpec, split: str) -> Dataset:
    """Load one split of a dataset; a file has the one split `train`.

    Raises:
        TaskError: The data or the split is not there, or cannot be read.
    """
    from datasets import load_dataset

    path = Path(dataset.path).expanduser()
    try:
        if path.suffix in _BUILDERS:
            if not path.is_file():
                raise TaskError(f"task.dataset.path `{dataset.path}`: there is no such file. Correct the path.")
            return load_dataset(_BUILDERS[path.suffix], data_files=str(path), split=split)
        return load_dataset(str(path) if path.exists() else dataset.path, dataset.name, split=split)
    except TaskError:
        raise
    except Exception as error:  # datasets raises its own, fsspec's, pyarrow's and huggingface_hub's errors
        reason = (str(error) or repr(error)).splitlines()[0]
        raise TaskError(
            f"Split `{split}` of the dataset `{dataset.path}` cannot be loaded: {reason} Check task.dataset (path, "
            "name, train_split, eval_split). To hold examples out of the training split, give eval_split the same name."
        ) from error


def shuffled_rows(rows: Dataset, *, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every row with its number, in an order that only `seed` and the number of rows decide."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for index in order:
        yield index, rows[index]


def _take(
    spec: TaskSpec, split: str, count: int, pattern: re.Pattern[str] | None, seen: set[str], *, seed: int, key: str
) -> list[Example]:
    if count == 0:
        return []
    dataset = require_dataset(spec)
    rows = read_split(dataset, split)
    examples: list[Example] = []
    for index, row in shuffled_rows(rows, seed=seed):
        example = _to_example(spec, row, pattern, where=f"Row {index} of `{dataset.path}` ({split})")
        identity = prompt_key(example.prompt)
        if identity in seen:
            continue
        seen.add(identity)
        examples.append(example)
        if len(examples) == count:
            return examples
    raise TaskError(
        f"Split `{split}` of `{dataset.path}` has {len(rows)} rows, of which {len(examples)} have a prompt not used "
        f"before, but task.{key} asks for {count}. Ask for fewer, or name another split."
    )


def _to_example(spec: TaskSpec, row: dict[str, Any], pattern: re.Pattern[str] | None, *, where: str) -> Example:
    if spec.prompt is None and "prompt" not in row:
        raise TaskError(
            f"{where} has no column `prompt`; its columns are {', '.join(row)}. Set task.prompt to a template such as "
            f"'{{{next(iter(row))}}}'."
        )
    text = _reference(spec, row, where)
    answer = find_answer(pattern, text)
    if answer is None:
        raise TaskError(
            f"{where} gives no answer: task.answer_pattern {spec.answer_pattern!r} finds nothing in {text[:200]!r}. "
            "Correct the pattern; if the column holds the bare answer, let task.answer add what the pattern looks for "
            "(such as '#### {answer}')."
        )
    return Example(build_prompt(spec, row, default="prompt", where=where), answer, row)


def _reference(spec: TaskSpec, row: dict[str, Any], where: str) -> str:
    """Return the text that holds the reference answer."""
    if spec.answer is not None:
        return render_template(spec.answer, row, key=f"{where}: task.answer")
    name = next((name for name in ("answer", "completion") if name in row), None)
    if name is None:
        raise TaskError(
            f"{where} has no column `answer` and no column `completion`; its columns are {', '.join(row)}. Set "
            f"task.answer to a template such as '{{{list(row)[-1]}}}'."
        )
    if name == "completion" and isinstance(row[name], list) and row[name]:
        return str(row[name][-1]["content"])
    return render_template(f"{{{name}}}", row, key=f"{where}: task.answer")
