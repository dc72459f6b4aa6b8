"""The table of model sizes and numbers of GPUs in docs/plan.md: real configs, one setting, every method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from subnet_ft.plan.build import CLASSICAL, Row, row_of
from subnet_ft.plan.request import ASSUMED_DENSITY, Request
from subnet_ft.plan.setting import Setting
from subnet_ft.plan.shapes import ModelShapes, shapes_of
from subnet_ft.plan.trained import Trained, adapted, fully, of_density
from subnet_ft.plan.units import size_text
from subnet_ft.recipe.schema import ModelSpec, OptimizerSpec, Recipe, SubnetSpec
from subnet_ft.recipe.task_schema import TaskSpec

TOKENS = 2048
GPU_BYTES = 80_000_000_000
_LAUNCHES = (("none", 1), *(("ddp", gpus) for gpus in (8, 64)), *(("fsdp2", gpus) for gpus in (2, 4, 8, 16, 32, 64)))
_METHODS = (CLASSICAL, "full", "subnet", "lora")

_SETTING = Setting(
    sequences=1,
    length=TOKENS,
    scored=TOKENS,
    micro_batches=1,
    batch_size=1,
    activation_checkpointing=True,
    head="fused",
    generation=None,
    has_reference=False,
    beside=None,
    beside_trains="full",
    has_teacher=False,
    assumptions=(),
)


def size_names() -> list[str]:
    """Return the names of the sizes."""
    return list(_sizes())


def sizes_table(names: Sequence[str] | None = None) -> str:
    """Return the table in Markdown: memory of a rank at the peak, and what it sends per step.

    Args:
        names: Which sizes; all when `None`.
    """
    lines = [
        "| model | launch | torch's AdamW, bf16 state | full run | subnetwork | LoRA, r 16 | sent per step: full run | "
        "subnetwork | LoRA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    sizes = _sizes()
    rows = [(size, row) for size in names or sizes for row in _rows(_shapes(size, sizes[size]))]
    for start in range(0, len(rows), len(_METHODS)):
        size = rows[start][0]
        group = {row.method: row for _, row in rows[start : start + len(_METHODS)]}
        first = group["full"]
        launch = "1 GPU" if first.gpus == 1 else f"{first.gpus} GPUs, {'DDP' if first.sharding == 'ddp' else 'FSDP2'}"
        memory = " | ".join(_memory(group[method]) for method in _METHODS)
        traffic = " | ".join(_traffic(group[method]) for method in ("full", "subnet", "lora"))
        lines.append(f"| {size} | {launch} | {memory} | {traffic} |")
    return "\n".join(lines)


def _sizes() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(files("subnet_ft.plan").joinpath("sizes.json").read_text(encoding="utf-8"))
    return table


def _memory(row: Row) -> str:
    if row.memory is None:
        return "refused"
    text = size_text(row.memory.total)
    return f"**{text}**" if row.fits else text


def _traffic(row: Row) -> str:
    return "" if row.traffic is None or row.gpus == 1 else size_text(row.traffic.total)


def _shapes(size: str, entry: dict[str, Any]) -> ModelShapes:
    from transformers import AutoConfig

    fields = dict(entry["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return shapes_of(config, f"{entry['of']} ({size})", dtype="bfloat16")


def _rows(shapes: ModelShapes) -> list[Row]:
    recipe = Recipe(
        model=ModelSpec(name=shapes.name),
        task=TaskSpec(name="dataset"),
        algorithm="sft",
        subnet=SubnetSpec(optimizer=OptimizerSpec(master="remainder")),
        output="none",
    )
    trained: dict[str, Trained] = {
        CLASSICAL: fully(shapes),
        "full": fully(shapes),
        "subnet": of_density(shapes, ASSUMED_DENSITY),
        "lora": adapted(shapes, "lora", {}),
    }
    return [
        row_of(recipe, Request(gpus=gpus, memory=GPU_BYTES), method, sharding, shapes, trained[method], _SETTING)
        for sharding, gpus in _LAUNCHES
        for method in _METHODS
    ]
