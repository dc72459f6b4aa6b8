"""A plan: a row for every method and way to shard, and for what does not fit, what would."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from subnet_ft.masks import SubnetMask
from subnet_ft.plan.rank import Part, RankMemory, rank_memory
from subnet_ft.plan.request import ASSUMED_DENSITY, Request
from subnet_ft.plan.setting import Setting, setting_of
from subnet_ft.plan.shapes import ModelShapes, read_shapes
from subnet_ft.plan.traffic import Traffic, traffic_of
from subnet_ft.plan.trained import Trained, adapted, fully, of_density, of_mask, with_value_head
from subnet_ft.recipe.algorithms import ALGORITHMS
from subnet_ft.recipe.methods import METHODS
from subnet_ft.recipe.schema import MethodSpec

if TYPE_CHECKING:
    from subnet_ft.recipe import Recipe

Load: TypeAlias = Callable[[Sequence[str]], "Recipe"]
"""Takes overrides, `key=value`, and returns the recipe with them, checked."""

CLASSICAL = "torch_adamw_bf16"
"""Not a method of ours: `torch.optim.AdamW` on bfloat16 weights with bfloat16 moments and dense gradients, without
masters, so that small updates are lost. What people compare with."""

RESERVED_BYTES = 800_000_000
"""Assumed for the GPU's context, its libraries and buffers of collectives."""
RESERVED_SHARE = 0.05
"""Of the GPU's memory, assumed for what the allocator cannot use."""


@dataclass(frozen=True)
class Row:
    """One method under one way to shard.

    Args:
        method: Its name, or `CLASSICAL`.
        sharding: As in `SHARDINGS`.
        gpus: Ranks.
        num_trainable: Weights that train.
        num_parameters: Weights in memory.
        memory: Of the rank that holds most; `None` where the combination is refused.
        traffic: Of a rank per optimizer step; `None` likewise.
        refused: Why it cannot be trained, if it cannot.
        budget: Bytes that a rank may use; `None`: not asked.
    """

    method: str
    sharding: str
    gpus: int
    num_trainable: int = 0
    num_parameters: int = 0
    memory: RankMemory | None = None
    traffic: Traffic | None = None
    refused: str | None = None
    budget: int | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the peak stays within the budget; `None` where that was not asked, or the row is refused."""
        if self.memory is None or self.budget is None:
            return None
        return self.memory.total <= self.budget


@dataclass(frozen=True)
class Plan:
    """What a recipe will need.

    Args:
        recipe: The recipe.
        request: What was asked for.
        shapes: Its model.
        setting: What its trainer does in a step.
        density: Of the subnetwork's mask.
        density_from: Where that is from.
        rows: A row for every method and way to shard.
        assumptions: What was assumed, a sentence each.
    """

    recipe: Recipe
    request: Request
    shapes: ModelShapes
    setting: Setting
    density: float
    density_from: str
    rows: tuple[Row, ...]
    assumptions: tuple[str, ...]


def make_plan(load: Load, request: Request, overrides: Sequence[str] = ()) -> Plan:
    """Plan a recipe from configs alone; no weight is read.

    Args:
        load: Loads the recipe with overrides.
        request: How it is to be run.
        overrides: Of the recipe.

    Raises:
        SubnetError: The recipe, its model's config or its mask file cannot be read, or a method refuses the model.
    """
    recipe = load(overrides)
    shapes = shapes_for(recipe)
    setting = setting_of(recipe, request, "full")
    _, density, source = _subnetwork(recipe, shapes, request)
    rows = []
    for method in request.all_methods:
        for sharding in request.all_shardings:
            rows.append(plan_row(recipe, request, method, sharding))
            if method == "full":
                rows.append(plan_row(recipe, request, CLASSICAL, sharding))
    assumptions = list(setting.assumptions)
    if source == "assumed" and "subnet" in request.all_methods:
        assumptions.insert(
            0,
            f"Density {density:g}: the mask is not known before a full run. Say --density D, or --mask FILE.",
        )
    if request.memory is not None:
        assumptions.append(
            f"{RESERVED_BYTES / 1e9:g} GB of a GPU for its context and libraries, and {RESERVED_SHARE:.0%} of it for "
            "what the allocator cannot use."
        )
    elif setting.generation is not None and setting.generation.engine == "colocate":
        assumptions.append("Nothing for vLLM beside the trainer: it takes a share of --memory, which is not given.")
    if any(row.sharding.startswith("fsdp2") for row in rows):
        assumptions.append("Under FSDP2 a mask's weights lie evenly over the rows of every tensor.")
    return Plan(recipe, request, shapes, setting, density, source, tuple(rows), tuple(assumptions))


def shapes_for(recipe: Recipe) -> ModelShapes:
    """Return the shapes of what a recipe trains."""
    spec = recipe.model
    return read_shapes(
        spec.name,
        dtype=spec.dtype,
        kind=ALGORITHMS[recipe.algorithm].model_kind,
        revision=spec.revision,
        attn_implementation=spec.attn_implementation,
    )


def plan_row(recipe: Recipe, request: Request, method: str, sharding: str) -> Row:
    """Plan one method under one way to shard; arguments as in `Row`."""
    refused = refusal(recipe, method, sharding, request.gpus)
    if refused is not None:
        return Row(method, sharding, request.gpus, refused=refused, budget=budget_of(request))
    shapes = shapes_for(recipe)
    named = "full" if method == CLASSICAL else method
    setting = setting_of(recipe, request, named)
    return row_of(recipe, request, method, sharding, shapes, trained_by(recipe, shapes, request, named), setting)


def row_of(
    recipe: Recipe,
    request: Request,
    method: str,
    sharding: str,
    shapes: ModelShapes,
    trained: Trained,
    setting: Setting,
) -> Row:
    """Plan a model under a method and what its trainer does; `plan_row` reads both off the recipe."""
    budget = budget_of(request)
    refused = refusal(recipe, method, sharding, request.gpus)
    if refused is not None:
        return Row(method, sharding, request.gpus, refused=refused, budget=budget)
    memory = rank_memory(
        recipe,
        shapes,
        trained,
        setting,
        sharding=sharding,
        world=request.gpus,
        device=request.device,
        gpu_bytes=request.memory,
        teacher=_teacher(recipe, setting),
        beside=_beside(shapes, trained, setting),
    )
    generation = setting.generation
    samples_here = generation is not None and generation.engine == "trainer"
    has_second_model = setting.has_reference and trained.method in ("full", "subnet")
    traffic = traffic_of(
        trained,
        sharding,
        request.gpus,
        micro_batches=setting.micro_batches,
        gathers=int(has_second_model),
        generated=generation.passes * generation.new if generation is not None and samples_here else 0.0,
    )
    if method == CLASSICAL:
        memory = _classical(memory, trained, request.gpus if sharding.startswith("fsdp2") else 1)
        if sharding == "ddp":
            traffic = Traffic(gradients=traffic.dense_gradients, dense_gradients=traffic.dense_gradients)
    return Row(
        method, sharding, request.gpus, trained.num_trainable, trained.num_parameters, memory, traffic, None, budget
    )


def budget_of(request: Request) -> int | None:
    """Return the bytes that a rank may use; `None` where that was not asked."""
    if request.memory is None:
        return None
    return max(0, int(request.memory * (1 - RESERVED_SHARE)) - RESERVED_BYTES)


def refusal(recipe: Recipe, method: str, sharding: str, gpus: int) -> str | None:
    """Say why a launch would be refused, as the end of a sentence; `None` if it would not."""
    if gpus > 1 and recipe.algorithm in ("ppo", "prime"):
        return f"`{recipe.algorithm}` trains a second model beside the policy, in one process only"
    if sharding.startswith("fsdp2") and method != CLASSICAL and METHODS[method].trains == "adapter":
        return "adapters are not trained under FSDP2; choose ddp"
    return None


def trained_by(recipe: Recipe, shapes: ModelShapes, request: Request, method: str) -> Trained:
    """Return the model under a method."""
    if method == "full":
        return fully(shapes)
    if method == "subnet":
        return _subnetwork(recipe, shapes, request)[0]
    return adapted(shapes, method, recipe.methods.get(method, MethodSpec()).config)


def _subnetwork(recipe: Recipe, shapes: ModelShapes, request: Request) -> tuple[Trained, float, str]:
    """Return the model under its mask, the mask's density, and where that is from."""
    source = recipe.subnet.source
    path = request.mask
    if path is None and request.density is None and source.kind == "file" and source.path is not None:
        path = Path(source.path) if Path(source.path).is_file() else None
    if path is not None:
        mask = SubnetMask.load(path)
        return of_mask(shapes, mask), mask.density, str(path)
    if request.density is not None:
        return of_density(shapes, request.density), request.density, "--density"
    if source.density is not None:
        return of_density(shapes, source.density), source.density, "subnet.source.density"
    return of_density(shapes, ASSUMED_DENSITY), ASSUMED_DENSITY, "assumed"


def _teacher(recipe: Recipe, setting: Setting) -> ModelShapes | None:
    if not setting.has_teacher or recipe.teacher is None:
        return None
    return read_shapes(recipe.teacher.name, dtype=recipe.teacher.dtype, revision=recipe.teacher.revision)


def _beside(shapes: ModelShapes, trained: Trained, setting: Setting) -> Trained | None:
    if setting.beside is None:
        return None
    own = trained if setting.beside_trains == "subnet" and trained.method == "subnet" else fully(shapes)
    return with_value_head(own, shapes) if setting.beside == "value_model" else own


def _classical(memory: RankMemory, trained: Trained, world: int) -> RankMemory:
    """Return the memory of the same steps under torch's AdamW with bfloat16 state."""
    weights = sum(tensor.nbytes for tensor in trained.sharded(world))
    counted = {"weights": weights, "gradients": weights, "moments": 2 * weights}
    held = memory.host or memory.persistent
    others = [part for part in held if part.name not in ("weights", "gradients", "moments", "masters", "mask")]
    parts = (*(Part(name, size, is_exact=True) for name, size in counted.items()), *others)
    if memory.host:
        return dataclasses.replace(memory, host=parts)
    return dataclasses.replace(memory, persistent=parts)
