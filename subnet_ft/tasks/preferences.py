"""Preferences and labelled completions from the Hub or from disk, in the formats that TRL's trainers read."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

from subnet_ft.errors import TaskError
from subnet_ft.tasks.hub_data import read_split, require_dataset, shuffled_rows
from subnet_ft.tasks.prompts import build_prompt, prompt_key

if TYPE_CHECKING:
    from datasets import Dataset

    from subnet_ft.recipe import TaskSpec


def preference_dataset(
    spec: TaskSpec, *, seed: int = 0, part: Literal["train", "eval"] = "train", exclude: Collection[str] = ()
) -> Dataset:
    """Read `num_train` preferences: columns `chosen`, `rejected` and, unless it is part of both, `prompt`.

    Text stays text and messages stay messages. A `task.prompt` template fills the prompt, and `task.chat` turns text
    into messages. Without a `prompt` column TRL takes the common beginning of `chosen` and `rejected` as the prompt.

    Args:
        spec: The recipe's `task`, with a `dataset`.
        seed: Chooses and orders the rows.
        part: Whether to read `num_train` rows of `train_split` or `num_eval` rows of `eval_split`.
        exclude: Keys (`preference_key`) of preferences to pass over.

    Raises:
        TaskError: Missing columns, text mixed with messages, or too few rows.
    """
    from datasets import Dataset

    rows, where = _read(spec, part)
    _require(rows, ("chosen", "rejected"), where, "Preferences need `chosen` and `rejected`, and usually `prompt`.")
    count = spec.num_train if part == "train" else spec.num_eval
    taken = _take(spec, rows, seed, where, count=count, exclude=exclude)
    if len(taken) < count:
        raise TaskError(
            f"{where} has {len(rows)} rows, of which {len(taken)} are not about a training prompt, but task.num_{part} "
            f"asks for {count}. Ask for fewer, or name another split."
        )
    return Dataset.from_list(taken)


def preference_key(row: dict[str, Any]) -> str:
    """Return what two preferences must not share if one is held out: the prompt, or where none is known the texts."""
    if "prompt" in row:
        return prompt_key(row["prompt"])
    if isinstance(row["chosen"], list):
        return prompt_key(row["chosen"][:-1])
    return json.dumps([row["chosen"], row["rejected"]])


def labelled_dataset(spec: TaskSpec, *, seed: int = 0) -> Dataset:
    """Read `num_train` rows as labelled completions: columns `prompt`, `completion` and `label`.

    Rows with a `label` are taken as they are; of preferences, each gives two: the chosen completion is right, the
    rejected one wrong. The order is random, because TRL's KTO reads rows in order and compares neighbours.

    Args:
        spec: The recipe's `task`, with a `dataset`.
        seed: Chooses and orders the rows.

    Raises:
        TaskError: Missing columns, labels that are not true or false, text mixed with messages, or too few rows.
    """
    from datasets import Dataset

    rows, where = _read(spec)
    if "label" in rows.column_names:
        _require(rows, ("completion", "label"), where, "Labelled completions need `prompt`, `completion` and `label`.")
        return Dataset.from_list(_take(spec, rows, seed, where, columns=("completion",), label=True))
    needed = "Labels need `prompt`, `completion` and `label`; preferences `chosen`, `rejected` and usually `prompt`."
    _require(rows, ("chosen", "rejected"), where, needed)
    labelled = [row for pair in _take(spec, rows, seed, where) for row in _unpair(pair, where)]
    random.Random(seed).shuffle(labelled)
    return Dataset.from_list(labelled)


def _read(spec: TaskSpec, part: Literal["train", "eval"] = "train") -> tuple[Dataset, str]:
    """Return the split of a part and what messages call it."""
    dataset = require_dataset(spec)
    split, count = (dataset.train_split, spec.num_train) if part == "train" else (dataset.eval_split, spec.num_eval)
    rows = read_split(dataset, split)
    where = f"Split `{split}` of `{dataset.path}`"
    if len(rows) < count:
        raise TaskError(f"{where} has {len(rows)} rows, but task.num_{part} asks for {count}. Ask for fewer.")
    return rows, where


def _require(rows: Dataset, columns: tuple[str, ...], where: str, advice: str) -> None:
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise TaskError(
            f"{where} has no column {' and no column '.join(f'`{name}`' for name in missing)}; its columns are "
            f"{', '.join(rows.column_names)}. {advice}"
        )


def _take(
    spec: TaskSpec,
    rows: Dataset,
    seed: int,
    where: str,
    *,
    columns: tuple[str, ...] = ("chosen", "rejected"),
    label: bool = False,
    count: int | None = None,
    exclude: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return the first `count` rows of a shuffled order: the prompt, `columns`, and `label` if asked for."""
    taken: list[dict[str, Any]] = []
    for index, row in shuffled_rows(rows, seed=seed):
        if len(taken) == (spec.num_train if count is None else count):
            break
        at = f"{where}, row {index}"
        kept = _to_row(spec, row, columns, where=at)
        if exclude and preference_key(kept) in exclude:
            continue
        if label:
            if "prompt" not in kept or row["label"] not in (True, False):
                raise TaskError(
                    f"{at}, must have a prompt and a label that is true or false, but the label is {row['label']!r}. "
                    "Set task.prompt to a template, or correct the data."
                )
            kept["label"] = bool(row["label"])
        taken.append(kept)
    return taken


def _unpair(pair: dict[str, Any], where: str) -> list[dict[str, Any]]:
    if "prompt" in pair:
        prompts = dict.fromkeys(("chosen", "rejected"), pair["prompt"])
        completions = {name: pair[name] for name in ("chosen", "rejected")}
    elif isinstance(pair["chosen"], list):
        prompts = {name: pair[name][:-1] for name in ("chosen", "rejected")}
        completions = {name: pair[name][-1:] for name in ("chosen", "rejected")}
    else:
        raise TaskError(
            f"{where} has no column `prompt`, so that its texts cannot be split into prompts and completions. Set "
            "task.prompt to a template."
        )
    return [
        {"prompt": prompts[name], "completion": completions[name], "label": name == "chosen"}
        for name in ("chosen", "rejected")
    ]


def _to_row(spec: TaskSpec, row: dict[str, Any], columns: tuple[str, ...], *, where: str) -> dict[str, Any]:
    pair = {name: row[name] for name in columns}
    if spec.prompt is not None or "prompt" in row:
        pair = {"prompt": build_prompt(spec, row, default="prompt", where=where), **pair}
        if spec.chat:
            for name in columns:
                if isinstance(pair[name], str):
                    pair[name] = [{"role": "assistant", "content": pair[name]}]
    kinds = {name: type(value).__name__ for name, value in pair.items()}
    if set(kinds.values()) not in ({"str"}, {"list"}):
        raise TaskError(
            f"{where}, must hold text in every column or messages in every column, but holds "
            f"{', '.join(f'{name}: {kind}' for name, kind in kinds.items())}. "
            "Set task.chat to true to turn text into messages."
        )
    return pair
