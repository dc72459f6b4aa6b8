"""What to change where a plan does not fit; each piece of advice is planned itself before it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from subnet_ft.errors import SubnetError
from subnet_ft.plan.build import CLASSICAL, Load, Row, plan_row
from subnet_ft.plan.request import Request
from subnet_ft.plan.setting import setting_of
from subnet_ft.recipe import Recipe
from subnet_ft.recipe.algorithms import ALGORITHMS

_RANKS = (2, 4, 8, 16, 32, 64)
_SMALLEST_DENSITY = 0.001


@dataclass(frozen=True)
class Advice:
    """One change, and what it comes to.

    Args:
        change: What to write: overrides of the recipe, or options of the launch.
        reason: What it does, as a sentence.
        total: Bytes of a rank at the peak with it.
        saved: Bytes that it saves of the peak.
        fits: Whether it fits then.
    """

    change: str
    reason: str
    total: int
    saved: int
    fits: bool


@dataclass(frozen=True)
class _Change:
    change: str
    reason: str
    overrides: tuple[str, ...] = ()
    method: str | None = None
    sharding: str | None = None
    gpus: int | None = None
    density: float | None = None


def advise(load: Load, overrides: Sequence[str], request: Request, row: Row) -> tuple[Advice, ...]:
    """Plan every change that may help a row that does not fit, and return those that save memory.

    Args:
        load: As in `make_plan`.
        overrides: Of the plan.
        request: Of the plan.
        row: A row of it that does not fit.
    """
    assert row.memory is not None
    if row.method == CLASSICAL:
        return ()
    recipe = load(overrides)
    planner = _Planner(load, overrides, request, row)
    found: list[Advice] = []
    together: tuple[str, ...] = ()
    best = row.memory.total
    for change in _within(recipe, request, row):
        advice = planner.advice(change)
        if advice is None:
            continue
        found.append(advice)
        joined = planner.row(_Change("", "", (*together, *change.overrides)))
        if joined is not None and joined.memory is not None and joined.memory.total < best:
            together, best = (*together, *change.overrides), joined.memory.total
    if len(found) > 1 and not any(advice.fits for advice in found):
        joined_advice = planner.advice(_Change(" ".join(together), "All of these together.", together))
        found += [joined_advice] if joined_advice is not None else []
    found += planner.first_that_fits(_more_ranks(row))
    found += [advice for change in _other_methods(row) if (advice := planner.advice(change)) is not None]
    if row.method == "subnet":
        density = planner.largest_density()
        if density is not None:
            found.append(density)
    return tuple(found)


class _Planner:
    def __init__(self, load: Load, overrides: Sequence[str], request: Request, row: Row) -> None:
        assert row.memory is not None
        self._load, self._overrides, self._request, self._row = load, tuple(overrides), request, row
        self._total = row.memory.total

    def row(self, change: _Change) -> Row | None:
        """Plan the row with a change; `None` where that is refused."""
        try:
            recipe = self._load((*self._overrides, *change.overrides))
        except SubnetError:
            return None
        request = dataclasses.replace(
            self._request,
            gpus=change.gpus or self._request.gpus,
            shardings=(),
            density=self._request.density if change.density is None else change.density,
            mask=self._request.mask if change.density is None else None,
        )
        planned = plan_row(recipe, request, change.method or self._row.method, change.sharding or self._row.sharding)
        return planned if planned.memory is not None else None

    def advice(self, change: _Change) -> Advice | None:
        """Return a change with what it comes to; `None` if it saves nothing."""
        planned = self.row(change)
        if planned is None or planned.memory is None or planned.memory.total >= self._total:
            return None
        total = planned.memory.total
        return Advice(change.change, change.reason, total, self._total - total, bool(planned.fits))

    def first_that_fits(self, changes: Iterator[_Change]) -> list[Advice]:
        """Return the first change that fits, or the last that saves something."""
        last: list[Advice] = []
        for change in changes:
            advice = self.advice(change)
            if advice is not None:
                last = [advice]
                if advice.fits:
                    break
        return last

    def largest_density(self) -> Advice | None:
        """Return the largest density that fits, to three digits below the point; `None` if none does."""
        low, high = 1, 1000
        if not self._fits(low / 1000):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(middle / 1000) else (low, middle)
        density = low / 1000
        reason = f"A mask of at most {density:.1%} of the weights fits."
        return self.advice(_Change(f"--density {density:g}", reason, density=density))

    def _fits(self, density: float) -> bool:
        planned = self.row(_Change("", "", density=density))
        return planned is not None and bool(planned.fits)


def _within(recipe: Recipe, request: Request, row: Row) -> Iterator[_Change]:
    """Yield changes of the recipe that leave method and launch as they are."""
    setting = setting_of(recipe, request, "full")
    optimizer = recipe.subnet.optimizer
    if optimizer.name == "adamw" and optimizer.master == "fp32" and row.method in ("full", "subnet"):
        change = "subnet.optimizer.master=remainder"
        yield _Change(change, "Exact fp32 masters in 2 bytes instead of 4 per trained weight.", (change,))
    if not setting.activation_checkpointing:
        change = "training.activation_checkpointing=true"
        yield _Change(change, "Layers are computed again in the backward pass: about a third slower.", (change,))
    least = 2 if recipe.algorithm == "kto" else 1
    if setting.batch_size > least:
        smaller = _divisor(setting.batch_size, least)
        changes: tuple[str, ...] = (
            f"training.per_device_train_batch_size={smaller}",
            f"training.gradient_accumulation_steps={setting.micro_batches * setting.batch_size // smaller}",
        )
        if setting.generation is not None and "steps_per_generation" in recipe.training:
            factor = setting.batch_size // smaller
            changes += (f"training.steps_per_generation={recipe.training['steps_per_generation'] * factor}",)
        yield _Change(" ".join(changes), "The same batch in smaller pieces.", changes)
    generation = setting.generation
    if generation is not None and generation.engine == "trainer":
        least_rounds = _fewest_rounds(recipe, setting.batch_size)
        if least_rounds < generation.sequences // setting.batch_size:
            change = f"training.steps_per_generation={least_rounds}"
            yield _Change(change, "Fewer completions are sampled at a time.", (change,))
    if setting.has_reference and row.method in ("full", "subnet"):
        yield from _references(recipe, row)


def _references(recipe: Recipe, row: Row) -> Iterator[_Change]:
    if recipe.algorithm in ("dpo", "kto"):
        change = "training.precompute_ref_log_probs=true"
        yield _Change(change, "Reference log-probabilities are computed once, before the first step.", (change,))
    if recipe.reference.source == "model" and row.method == "subnet":
        change = "reference.source=policy"
        yield _Change(change, "The policy is its own reference, with the base's values swapped in.", (change,))
    if recipe.reference.source == "model" and recipe.reference.quantization is None:
        change = "reference.quantization=nf4"
        yield _Change(change, "The reference model in 4 bits: another loss, that of the rounded model.", (change,))


def _more_ranks(row: Row) -> Iterator[_Change]:
    for gpus in _RANKS:
        if gpus > row.gpus or (gpus == row.gpus and row.sharding == "ddp"):
            change = f"--gpus {gpus} --sharding fsdp2"
            yield _Change(change, "A part of the weights and their state on each.", sharding="fsdp2", gpus=gpus)


def _other_methods(row: Row) -> Iterator[_Change]:
    if row.method == "full":
        yield _Change("method=subnet", "Gradients and state for the subnetwork only.", method="subnet")
    if row.method in ("full", "subnet"):
        yield _Change("method=lora", "Added weights are trained instead.", method="lora")


def _divisor(batch_size: int, least: int) -> int:
    return next(size for size in range(least, batch_size + 1) if batch_size % size == 0)


def _fewest_rounds(recipe: Recipe, batch_size: int) -> int:
    """Return the fewest micro-batches that hold whole groups of completions of a prompt."""
    group = int(recipe.training.get("num_generations", 8 if ALGORITHMS[recipe.algorithm].judge == "rewards" else 1))
    return -(-group // batch_size)
