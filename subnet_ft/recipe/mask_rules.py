"""Which fields of a mask's source go together, and which controls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from subnet_ft.recipe.mask_schema import CHOSEN, COMPARED, PROBED, READ_MOMENTS, SourceSpec
from subnet_ft.recipe.parsing import show
from subnet_ft.recipe.schema import Recipe

Problems: TypeAlias = Iterator[tuple[str, str]]


def mask_source(recipe: Recipe) -> Problems:
    """Check the fields of `subnet.source` against its kind."""
    source, where = recipe.subnet.source, "subnet.source"
    if source.kind == "file":
        if not source.path:
            yield f"{where}.path", "missing; `kind: file` needs the path of a mask file"
        if source.criterion != "exact" or source.tolerance > 0:
            yield f"{where}.kind", "a mask file fixes the mask; remove `criterion` and `tolerance`"
    elif source.path is not None:
        yield f"{where}.path", f"only for `kind: file`, got {show(source.path)} with `kind: {source.kind}`"
    if source.kind in COMPARED:
        if source.criterion == "exact" and source.tolerance > 0:
            yield (
                f"{where}.tolerance",
                f"must be 0 with `criterion: exact`, got {source.tolerance:g}; use `absolute` or `relative`",
            )
    elif source.kind != "file" and (source.criterion != "exact" or source.tolerance > 0):
        yield f"{where}.criterion", f"`kind: {source.kind}` compares nothing; remove `criterion` and `tolerance`"
    yield from _amounts(recipe, source)


def moments(recipe: Recipe) -> Problems:
    """Refuse a source that reads what the optimizer knows of every weight where the optimizer does not keep it."""
    kind, optimizer = recipe.subnet.source.kind, recipe.subnet.optimizer
    if kind not in READ_MOMENTS:
        return
    if optimizer.name != "adamw":
        yield (
            "subnet.source.kind",
            f"`{kind}` reads AdamW's fp32 moments after the first steps, and `subnet.optimizer.name` is "
            f"{optimizer.name}, which keeps none; use `adamw`, or `kind: early`",
        )
    elif kind == "forecast" and optimizer.master == "none":
        yield (
            "subnet.source.kind",
            "`forecast` needs to know how far weights have drifted since they were rounded, and "
            "`subnet.optimizer.master` is none; use `fp32` or `remainder`, or `kind: early`",
        )


def controls(recipe: Recipe) -> Problems:
    """Refuse a control that is listed twice."""
    for name in sorted({name for name in recipe.controls if recipe.controls.count(name) > 1}):
        yield "controls", f"`{name}` is listed {recipe.controls.count(name)} times; once is enough"


def _amounts(recipe: Recipe, source: SourceSpec) -> Problems:
    for name, kinds, what in (
        ("steps", PROBED, "how many steps of the full run to look at"),
        ("density", CHOSEN, "the share of the weights to train"),
    ):
        value = getattr(source, name)
        is_estimated = name == "density" and source.kind == "forecast"
        if source.kind in kinds and value is None and not is_estimated:
            yield f"subnet.source.{name}", f"missing; `kind: {source.kind}` needs {what}"
        elif source.kind not in kinds and value is not None:
            users = ", ".join(f"`{kind}`" for kind in kinds)
            yield f"subnet.source.{name}", f"not used by `kind: {source.kind}`, only by {users}; remove it"
    most = recipe.training.get("max_steps", -1)
    if source.kind in PROBED and source.steps is not None and isinstance(most, int) and 0 < most <= source.steps:
        yield (
            "subnet.source.steps",
            f"must be < training.max_steps ({most}), got {source.steps}; the whole run's mask is `kind: extract`",
        )
