"""How long a study will take: from finished runs where there are any, else a rough guess from the model's size."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from subnet_ft.evidence.report.wording import duration
from subnet_ft.recipe import Recipe
from subnet_ft.stages import FINISHED, read_json
from subnet_ft.studies.plan import Cell, Plan

logger = logging.getLogger(__name__)

_PROMPT_TOKENS = 64
_COMPLETION_TOKENS = 256
# Forward and backward take six operations per weight and token; sampling and what is no matrix product, as much again.
_OPERATIONS = 12
_MATRIX = 1024


class Clock:
    """Says before a study how long it will take, and after every cell how much is left.

    Args:
        plan: The study.
        num_parameters: Of the recipe's model.
    """

    def __init__(self, plan: Plan, num_parameters: int) -> None:
        self._plan = plan
        self._todo = [cell for cell in plan.cells if not cell.is_done]
        self._per_step = measured_step_seconds(plan)
        self._is_guess = self._per_step is None
        if self._per_step is None:
            self._per_step = guessed_step_seconds(plan.recipe, num_parameters)
        self._start = time.perf_counter()
        self._steps = 0

    def announce(self) -> None:
        """Say how many cells there are, and roughly how long they take."""
        left = sum(map(self._weight, self._todo))
        assert self._per_step is not None
        guess = ", a guess from the model's size that may be wrong by a few times" if self._is_guess else ""
        logger.info(
            "study %s: %d cells, %d of them done before; %s steps to train, about %s%s",
            self._plan.study,
            len(self._plan.cells),
            len(self._plan.cells) - len(self._todo),
            f"{left:,}",
            duration(left * self._per_step),
            guess,
        )

    def begin(self, cell: Cell) -> None:
        """Say which cell is next."""
        logger.info("cell %d of %d: %s", self._plan.cells.index(cell) + 1, len(self._plan.cells), cell.label)

    def end(self, cell: Cell) -> None:
        """Say how long the rest takes, at the pace so far."""
        if cell not in self._todo:
            return
        self._todo.remove(cell)
        self._steps += self._weight(cell)
        left = sum(map(self._weight, self._todo))
        if self._steps and left:
            pace = (time.perf_counter() - self._start) / self._steps
            cells = "1 cell" if len(self._todo) == 1 else f"{len(self._todo)} cells"
            logger.info("%s to go, about %s", cells, duration(left * pace))

    def _weight(self, cell: Cell) -> int:
        """Steps of a cell; one of another model, which is a tiny one, counts nothing."""
        return cell.num_steps if cell.recipe.model.name == self._plan.recipe.model.name else 0


def total_steps(cells: Sequence[Cell]) -> int:
    """Return the optimizer steps of all cells."""
    return sum(cell.num_steps for cell in cells)


def measured_step_seconds(plan: Plan) -> float | None:
    """Return the seconds per step, evaluation included, of the plan's finished cells; `None` without any."""
    seconds = steps = 0.0
    for cell in plan.cells:
        if cell.recipe.model.name != plan.recipe.model.name:
            continue
        folder = Path(cell.recipe.output)
        trained = read_json(folder / cell.stage / FINISHED)
        if trained is None or trained.get("results", {}).get("resumed_from"):
            continue
        judged = read_json(folder / "evaluation" / cell.stage / FINISHED)
        seconds += trained["results"]["seconds"] + (judged["results"]["seconds"] if judged else 0.0)
        steps += trained["results"]["num_steps"]
    return seconds / steps if steps else None


def guessed_step_seconds(recipe: Recipe, num_parameters: int) -> float:
    """Guess the seconds of a step from the model's size, the batch, and this machine's matrix products.

    Args:
        recipe: Says the batch.
        num_parameters: Weights of the model.
    """
    training = recipe.training
    rows = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
    tokens: int = rows * (_PROMPT_TOKENS + (training.get("max_completion_length") or _COMPLETION_TOKENS))
    return _OPERATIONS * num_parameters * tokens / _operations_per_second(recipe.model.dtype)


def _operations_per_second(dtype: str) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(_MATRIX, _MATRIX, dtype=getattr(torch, dtype), device=device)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * _MATRIX**3 / best
