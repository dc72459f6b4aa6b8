"""From a recipe's `task` to a `Task`."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from subnet_ft.errors import TaskError
from subnet_ft.tasks.hub_data import load_hub_task
from subnet_ft.tasks.procedural import PREFIX, load_procedural_task
from subnet_ft.tasks.prompts import did_you_mean
from subnet_ft.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset

    from subnet_ft.recipe import TaskSpec


def load_task(spec: TaskSpec, *, seed: int, exclude: Collection[str] = ()) -> Task:
    """Draw or read the examples of a task; the same `spec` and `seed` give the same examples in every process.

    Args:
        spec: The recipe's `task`.
        seed: Chooses and orders the examples.
        exclude: Keys (`prompt_key`) of prompts that no example may have.

    Raises:
        TaskError: An unknown task, parameters it does not take, missing columns, or fewer examples than asked for.
    """
    if spec.name.startswith(PREFIX):
        return load_procedural_task(spec, seed=seed, exclude=exclude)
    if spec.name == "dataset":
        return load_hub_task(spec, seed=seed, exclude=exclude)
    raise TaskError(
        f"task.name `{spec.name}` is not a task.{did_you_mean(spec.name, ['dataset'])} "
        f"Write `{PREFIX}NAME`, such as `{PREFIX}chain_sum`, or `dataset` for what task.dataset names."
    )


def prompt_dataset(task: Task) -> Dataset:
    """Return the training prompts for a TRL trainer that generates: columns `prompt` and `example`.

    `example` is the index into `task.train`, by which `reward_functions` find the reference again.
    """
    from datasets import Dataset

    return Dataset.from_dict(
        {"prompt": [example.prompt for example in task.train], "example": list(range(len(task.train)))}
    )
