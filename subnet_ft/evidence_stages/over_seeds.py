"""The summary over the seeds of training that a run repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subnet_ft.evidence.seeds import SeedSummary, summarize_seeds
from subnet_ft.recipe import Recipe
from subnet_ft.trained_runs import TrainedRuns


def over_seeds(
    recipe: Recipe, runs: TrainedRuns, records: Mapping[str, list[dict[str, Any]] | None]
) -> list[SeedSummary]:
    """Sum up the subnetwork and every control that was repeated, over all seeds.

    Args:
        recipe: Its seed, margin and confidence.
        runs: What was trained.
        records: What every model answered, by name.
    """
    solved: dict[str, NDArray[np.bool_]] = {}
    for name, answers in records.items():
        if answers:
            solved[name] = np.array([bool(record["correct"]) for record in answers], dtype=np.bool_)
    summaries = []
    for run in ("subnet", *runs.controls):
        names = {recipe.seed: run, **{seed: f"seed-{seed}/{run}" for seed in runs.repeats}}
        full = {seed: name[: len(name) - len(run)] + "full" for seed, name in names.items()}
        if len(names) < 2 or not {"base", *names.values(), *full.values()} <= solved.keys():
            continue
        summaries.append(
            summarize_seeds(
                run,
                solved["base"],
                {seed: solved[name] for seed, name in full.items()},
                {seed: solved[name] for seed, name in names.items()},
                margin=recipe.evaluation.margin,
                confidence=recipe.evaluation.confidence,
            )
        )
    return summaries
