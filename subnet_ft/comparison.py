"""Several methods on one recipe: each trained and judged as a stage of the same run, and put beside each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import subnet_ft
from subnet_ft.checkpoints.quantized import Quantization, quantized_size
from subnet_ft.errors import StageError
from subnet_ft.evidence.comparison import CopyEvidence, MethodComparison, MethodEvidence, build_comparison
from subnet_ft.masks import extract
from subnet_ft.methods.check import check_method
from subnet_ft.methods.saved import load_trained
from subnet_ft.pipeline import Pipeline
from subnet_ft.recipe import MethodSpec, recipe_to_dict
from subnet_ft.recipe.algorithms import ALGORITHMS
from subnet_ft.recipe.methods import HYPER_PARAMETERS, METHODS, training_of
from subnet_ft.stages import TrainedStage, run_stage
from subnet_ft.verification import compare_dtype

logger = logging.getLogger(__name__)


def compare(
    pipeline: Pipeline, methods: Sequence[str], *, quantizations: Sequence[Quantization] = ()
) -> MethodComparison:
    """Train every method from the base with the recipe's data, seed and steps, judge it, and compare.

    Stages are those of the run: what `subnet-ft run` or an earlier comparison finished is not repeated. A subnetwork
    whose mask is extracted from the full run has that trained first, whether it is among the methods or not.

    Args:
        pipeline: The recipe in its output folder.
        methods: Names of `METHODS`, in the order of the table.
        quantizations: Judge copies of every result quantized like this, too: `int8`, `nf4`.

    Raises:
        MethodError: A method cannot serve the model; nothing was trained then.
    """
    pipeline.start()
    # What cannot serve the model is better known before the others have trained.
    for name in methods:
        check_method(name, pipeline.recipe, pipeline.inputs.base)
    base_records = pipeline.answers("base", None)
    recipe = pipeline.recipe
    return build_comparison(
        version=subnet_ft.__version__,
        base_records=base_records,
        methods=[_evidence(pipeline, name, quantizations) for name in methods],
        confidence=recipe.evaluation.confidence,
        recipe=recipe_to_dict(recipe),
        seed=recipe.seed,
    )


def _evidence(pipeline: Pipeline, name: str, quantizations: Sequence[Quantization]) -> MethodEvidence:
    if name == "subnet" and pipeline.recipe.subnet.source.kind == "extract":
        pipeline.method_run("full")
    stage = pipeline.method_run(name)
    if "num_trainable" not in stage.results:
        raise StageError(
            f"`{stage.folder}` was made by an older subnet-ft, which did not measure what is compared. Choose another "
            "`output`, or remove that folder to train again."
        )
    recipe = pipeline.recipe
    settings, training = recipe.methods.get(name, MethodSpec()), training_of(recipe, name)
    return MethodEvidence(
        method=name,
        trains=METHODS[name].trains,
        results=stage.results,
        checkpoint_bytes=_weight_bytes(stage.folder),
        patch_bytes=_patch_bytes(pipeline, name, stage),
        training={
            key: training[key]
            for key in HYPER_PARAMETERS
            if key in training and (key == "learning_rate" or key in settings.training)
        },
        config=settings.config,
        records=pipeline.answers(name, stage),
        copies=[
            CopyEvidence(
                quantization,
                pipeline.answers(name, stage, quantization=quantization),
                _copy_bytes(pipeline, name, stage, quantization),
            )
            for quantization in quantizations
        ],
    )


def _patch_bytes(pipeline: Pipeline, name: str, stage: TrainedStage) -> int:
    """Count what a result needs in storage beside its base: an adapter's file, or changed values and their bits."""
    if METHODS[name].trains == "adapter":
        return _weight_bytes(stage.folder)

    def work(folder: Path) -> dict[str, Any]:
        base, recipe = pipeline.inputs.base, pipeline.recipe
        changed = extract(base, stage.folder, dtype=compare_dtype(base, recipe), progress=pipeline.progress)
        itemsize = getattr(torch, recipe.model.dtype).itemsize
        tensors = [tensor for tensor in changed.tensors.values() if tensor.count]
        return {"bytes": sum(-(-tensor.num_elements // 8) + itemsize * tensor.count for tensor in tensors)}

    return _measured(pipeline, name, {"base": pipeline.inputs.base_sha256, "result": stage.results["sha256"]}, work)


def _copy_bytes(pipeline: Pipeline, name: str, stage: TrainedStage, quantization: Quantization) -> int:
    """Count the tensors of a quantized copy, those of its adapter included."""

    def work(folder: Path) -> dict[str, Any]:
        loading = {**pipeline.inputs.of_loading(), "kind": ALGORITHMS[pipeline.recipe.algorithm].model_kind}
        model, _ = load_trained(stage.folder, pipeline.inputs.base.folder, quantization=quantization, **loading)
        return {"bytes": quantized_size(model)}

    inputs = {"result": stage.results["sha256"], "quantization": quantization, "load": pipeline.inputs.of_loading()}
    return _measured(pipeline, f"{name}-{quantization}", inputs, work)


def _measured(pipeline: Pipeline, name: str, inputs: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> int:
    results = run_stage(pipeline.folder / "sizes" / name, inputs, work, overwrite=pipeline.overwrite, cheap=True)
    size: int = results["bytes"]
    return size


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
