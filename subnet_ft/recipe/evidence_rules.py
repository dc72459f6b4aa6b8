"""Which requests for evidence can be met."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from subnet_ft.recipe.algorithms import trains_reward_model
from subnet_ft.recipe.methods import METHODS
from subnet_ft.recipe.parsing import did_you_mean
from subnet_ft.recipe.schema import Recipe

Problems: TypeAlias = Iterator[tuple[str, str]]


def baselines(recipe: Recipe) -> Problems:
    """Check the names of the methods that are trained beside the masks."""
    for name in dict.fromkeys(recipe.baselines):
        if name in ("full", "subnet"):
            yield "baselines", f"`{name}` is part of every run; remove it"
        elif name not in METHODS:
            yield "baselines", f"`{name}` is not a method{did_you_mean(name, METHODS)}"
        elif recipe.baselines.count(name) > 1:
            yield "baselines", f"`{name}` is listed {recipe.baselines.count(name)} times; once is enough"


def repeats(recipe: Recipe) -> Problems:
    """Check that every seed is another one."""
    seeds, where = recipe.repeats.seeds, "repeats.seeds"
    if recipe.seed in seeds:
        yield where, f"{recipe.seed} is the recipe's own `seed`; choose another one"
    for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        yield where, f"{seed} is listed {seeds.count(seed)} times; once is enough"


def retention(recipe: Recipe) -> Problems:
    """Check that there is something to measure retention on, and a model that writes."""
    spec = recipe.evaluation.retention
    if spec is None:
        return
    where = "evaluation.retention"
    if trains_reward_model(recipe.algorithm):
        yield where, f"not used by `{recipe.algorithm}`, whose model does not write; remove it"
    if not recipe.evaluation.enabled:
        yield where, "not measured with `evaluation.enabled: false`; remove one of them"
    for index, task in enumerate(spec.tasks):
        if task.num_eval == 0:
            yield f"{where}.tasks[{index}].num_eval", "missing, must be >= 1"
        for name in ("pairs", "completion", "rationales"):
            if getattr(task, name) is not None:
                yield f"{where}.tasks[{index}].{name}", "not used in evaluation; remove it"
