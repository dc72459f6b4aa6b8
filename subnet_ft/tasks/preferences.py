"""Preference data from the Hub or from disk, in the formats that TRL's preference trainers read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from subnet_ft.errors import TaskError
from subnet_ft.tasks.hub_data import read_split, require_dataset, shuffled_rows
from subnet_ft.tasks.prompts import build_prompt

if TYPE_CHECKING:
    from datasets import Dataset

    from subnet_ft.recipe import TaskSpec


def preference_dataset(spec: TaskSpec, *, seed: int = 0) -> Dataset:
    """Read `num_train` preferences: columns `chosen`, `rejected` and, unless it is part of both, `prompt`.

    Text stays text and messages stay messages. A `task.prompt` template fills the prompt, and `task.chat` turns text
    into messages. Without a `prompt` column TRL takes the common beginning of `chosen` and `rejected` as the prompt.

    Args:
        spec: The recipe's `task`, with a `dataset`.
        seed: Chooses and orders the rows.

    Raises:
        TaskError: Missing columns, text mixed with messages, or too few rows.
    """
    from datasets import Dataset

    dataset = require_dataset(spec)
    rows = read_split(dataset, dataset.train_split)
    where = f"Split `{dataset.train_split}` of `{dataset.path}`"
    missing = [name for name in ("chosen", "rejected") if name not in rows.column_names]
    if missing:
        raise TaskError(
            f"{where} has no column {' and no column '.join(f'`{name}`' for name in missing)}; its columns are "
            f"{', '.join(rows.column_names)}. Preferences need `chosen` and `rejected`, and usually `prompt`."
        )
    if len(rows) < spec.num_train:
        raise TaskError(f"{where} has {len(rows)} rows, but task.num_train asks for {spec.num_train}. Ask for fewer.")
    pairs: list[dict[str, Any]] = []
    for index, row in shuffled_rows(rows, seed=seed):
        if len(pairs) == spec.num_train:
            break
        pairs.append(_to_pair(spec, row, where=f"{where}, row {index}"))
    return Dataset.from_list(pairs)


def _to_pair(spec: TaskSpec, row: dict[str, Any], *, where: str) -> dict[str, Any]:
    pair = {name: row[name] for name in ("chosen", "rejected")}
    if spec.prompt is not None or "prompt" in row:
        pair = {"prompt": build_prompt(spec, row, default="prompt", where=where), **pair}
        if spec.chat:
            for name in ("chosen", "rejected"):
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
