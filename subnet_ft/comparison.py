"""Several methods on one recipe: each trained and judged as a stage of the same run, and put beside each other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import subnet_ft
from subnet_ft.evidence.comparison import CopyEvidence, MethodComparison, MethodEvidence, build_comparison
from subnet_ft.masks import extract
from subnet_ft.pipeline import Pipeline
from subnet_ft.recipe import recipe_to_dict
from subnet_ft.recipe.methods import HYPER_PARAMETERS, METHODS, training_of
from subnet_ft.stages import TrainedStage, run_stage
from subnet_ft.verification import compare_dtype

logger = logging.getLogger(__name__)


def compare(pipeline: Pipeline, methods: Sequence[str], *, quantizations: Sequence[str] = ()) -> MethodComparison:
    """Train every method from the base with the recipe's data, seed and steps, judge it, and compare.

    Stages are those of the run: what `subnet-ft run` or an earlier comparison finished is not repeated. A subnetwork
    whose mask is extracted from the full run has that trained first, whether it is among the methods or not.

    Args:
        pipeline: The recipe in its output folder.
        methods: Names of `METHODS`, in the order of the table.
        quantizations: Judge copies of every result quantised like this, too: `int8`, `nf4`.
    """
    pipeline.start()
    base_records = pipeline.answers("base", None)
    evidence = [_evidence(pipeline, name, quantizations) for name in methods]
    recipe = pipeline.recipe
    return build_comparison(
        version=subnet_ft.__version__,
        base_records=base_records,
        methods=[found for found, _ in evidence],
        confidence=recipe.evaluation.confidence,
        recipe=recipe_to_dict(recipe),
        environment=evidence[-1][1].results["environment"],
        seed=recipe.seed,
    )


def _evidence(pipeline: Pipeline, name: str, quantizations: Sequence[str]) -> tuple[MethodEvidence, TrainedStage]:
    if name == "subnet" and pipeline.recipe.subnet.source.kind == "extract":
        pipeline.method_run("full")
    stage = pipeline.method_run(name)
    method, recipe = METHODS[name], pipeline.recipe
    spec = recipe.methods.get(name)
    sizes = _sizes(pipeline, name, stage, quantizations)
    copies = []
    for quantization in quantizations:
        records = pipeline.answers(name, stage, quantization=quantization)
        copies.append(CopyEvidence(quantization, records, sizes[quantization]))
    training = training_of(recipe, name)
    own = () if spec is None else spec.training
    return MethodEvidence(
        method=name,
        trains=method.trains,
        results=stage.results,
        checkpoint_bytes=_weight_bytes(stage.folder),
        patch_bytes=sizes["patch"],
        training={key: training[key] for key in HYPER_PARAMETERS if key == "learning_rate" or key in own},
        config={} if spec is None else spec.config,
        records=pipeline.answers(name, stage),
        copies=copies,
    ), stage


def _sizes(pipeline: Pipeline, name: str, stage: TrainedStage, quantizations: Sequence[str]) -> dict[str, int]:
    """Measure what a result takes in storage: as a patch of its base, and quantised."""
    recipe, base = pipeline.recipe, pipeline.inputs.base

    def work(folder: Path) -> dict[str, Any]:
        if METHODS[name].trains == "adapter":
            return {"patch": _weight_bytes(stage.folder)}
        changed = extract(base, stage.folder, dtype=compare_dtype(base, recipe), progress=pipeline.progress)
        itemsize = getattr(torch, recipe.model.dtype).itemsize
        tensors = [tensor for tensor in changed.tensors.values() if tensor.count]
        return {"patch": sum(-(-tensor.num_elements // 8) + itemsize * tensor.count for tensor in tensors)}

    inputs = {"base": pipeline.inputs.base_sha256, "result": stage.results["sha256"]}
    return run_stage(pipeline.folder / "sizes" / name, inputs, work, overwrite=pipeline.overwrite, cheap=True)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
