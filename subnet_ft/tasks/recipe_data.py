"""Everything a recipe reads: what it trains on, and the held-out prompts it is judged on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from subnet_ft.recipe.training import ALGORITHM_DATA
from subnet_ft.tasks.load import load_task
from subnet_ft.tasks.preferences import preference_dataset
from subnet_ft.tasks.prompts import prompt_key
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
    """The training task; `None` when the recipe trains on a preference dataset."""

    preferences: Dataset | None
    """The preference dataset; `None` otherwise."""

    evaluation: Task | None
    """The task whose held-out examples are answered; `None` when evaluation is off."""


def load_recipe_data(recipe: Recipe) -> RecipeData:
    """Draw or read a recipe's data; the same recipe gives the same data in every process.

    Raises:
        TaskError: Data that cannot be had, or too little of it.
    """
    from_dataset = ALGORITHM_DATA.get(recipe.algorithm) == "preferences" and recipe.task.pairs is None
    task = None if from_dataset else load_task(recipe.task, seed=recipe.seed)
    preferences = preference_dataset(recipe.task, seed=recipe.seed) if from_dataset else None
    if not recipe.evaluation.enabled:
        return RecipeData(task, preferences, None)
    if recipe.evaluation.task is None:
        return RecipeData(task, preferences, task)
    training = set(_training_keys(task, preferences))
    return RecipeData(task, preferences, load_task(recipe.evaluation.task, seed=recipe.seed, exclude=training))


def _training_keys(task: Task | None, preferences: Dataset | None) -> Iterator[str]:
    if task is not None:
        yield from (prompt_key(example.prompt) for example in task.train)
    for row in preferences if preferences is not None else ():
        if "prompt" in row:
            yield prompt_key(row["prompt"])
        elif isinstance(row["chosen"], list):
            yield prompt_key(row["chosen"][:-1])
