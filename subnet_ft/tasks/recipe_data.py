"""Everything a recipe reads: what it trains on, and the held-out prompts it is judged on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from subnet_ft.recipe.algorithms import learns_from, trains_reward_model
from subnet_ft.tasks.load import load_task
from subnet_ft.tasks.preferences import labelled_dataset, preference_dataset, preference_key
from subnet_ft.tasks.prompts import prompt_key
from subnet_ft.tasks.rationales import with_prefix
from subnet_ft.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset

    from subnet_ft.recipe import Recipe


@dataclass(frozen=True)
class RecipeData:
    """A recipe's data; no held-out prompt is a training prompt.

    Prompts are compared whole, as a model sees them: the same question in another template is another prompt. Text
    preferences without a `prompt` column have no prompt to compare.
    """

    task: Task | None
    """The training task; `None` when the recipe trains on a dataset of preferences or labelled completions."""

    rows: Dataset | None
    """That dataset, in the format of its trainer; `None` otherwise."""

    evaluation: Task | None
    """The task whose held-out examples are answered, with the label's prefix where there is one; `None` when evaluation
    is off, or when pairs are told apart."""

    held_out_rows: Dataset | None = None
    """The held-out preferences of a reward model that learns from a dataset; `None` otherwise."""


def load_recipe_data(recipe: Recipe) -> RecipeData:
    """Draw or read a recipe's data; the same recipe gives the same data in every process.

    Raises:
        TaskError: Data that cannot be had, or too little of it.
    """
    task, rows = _training_data(recipe)
    if not recipe.evaluation.enabled:
        return RecipeData(task, rows, None)
    if trains_reward_model(recipe.algorithm):
        if rows is None:
            return RecipeData(task, rows, None)  # pairs are made of the task's held-out examples
        training = {preference_key(row) for row in rows}
        held_out = preference_dataset(recipe.task, seed=recipe.seed, part="eval", exclude=training)
        return RecipeData(task, rows, None, held_out)
    if recipe.evaluation.task is None:
        evaluation = task
    else:
        training = set(_training_keys(task, rows))
        evaluation = load_task(recipe.evaluation.task, seed=recipe.seed, exclude=training)
    if recipe.task.rationales is not None and evaluation is not None:
        evaluation = with_prefix(evaluation, recipe.task.rationales.label_prefix)
    return RecipeData(task, rows, evaluation)


def _training_data(recipe: Recipe) -> tuple[Task | None, Dataset | None]:
    data = learns_from(recipe.algorithm)
    if data in ("preferences", "labelled") and recipe.task.pairs is None:
        read = preference_dataset if data == "preferences" else labelled_dataset
        return None, read(recipe.task, seed=recipe.seed)
    return load_task(recipe.task, seed=recipe.seed), None


def _training_keys(task: Task | None, rows: Dataset | None) -> Iterator[str]:
    if task is not None:
        yield from (prompt_key(example.prompt) for example in task.train)
    for row in rows if rows is not None else ():
        if "prompt" in row:
            yield prompt_key(row["prompt"])
        elif isinstance(row["chosen"], list):
            yield prompt_key(row["chosen"][:-1])
