"""`subnet-ft evaluate --lm-eval`: the tasks of EleutherAI's harness on a model of ours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from subnet_ft import __version__
from subnet_ft.cli.results import FINE, Emit, check_folder, recipe_to_judge
from subnet_ft.errors import SubnetError


def evaluate_with_lm_eval(options: argparse.Namespace, emit: Emit) -> int:
    """Print what the harness finds of a model and, with `--against`, how it differs from another one's file."""
    from subnet_ft.evidence.lm_eval import (
        evaluate_with_harness,
        harness_differences,
        read_harness_results,
        write_harness_results,
    )

    against = None if options.against is None else read_harness_results(options.against)
    if options.output is not None:
        check_folder(Path(options.output).absolute().parent)
    model, tokenizer, settings = _load(options)
    results = evaluate_with_harness(
        model,
        tokenizer,
        options.lm_eval,
        name=options.model,
        limit=options.limit,
        chat=options.chat,
        tasks_from=options.tasks_from,
        **settings,
    )
    if options.output is not None:
        write_harness_results(results, options.output)
    differences = [] if against is None else harness_differences(results, against)
    if options.json:
        tasks = {
            task: {
                metric: {"value": entry.value, "ci_low": entry.low, "ci_high": entry.high}
                for metric, entry in judged.metrics.items()
            }
            for task, judged in results.tasks.items()
        }
        paired = [
            {
                "task": entry.task,
                "metric": entry.metric,
                "difference": entry.accuracy.difference,
                "ci_low": entry.accuracy.low,
                "ci_high": entry.accuracy.high,
                "num_prompts": entry.accuracy.num_prompts,
                "mcnemar_p": entry.tests.mcnemar_p,
            }
            for entry in differences
        ]
        emit(json.dumps({"version": __version__, "model": options.model, "tasks": tasks, "differences": paired}))
        return FINE
    for task, judged in results.tasks.items():
        for metric, entry in judged.metrics.items():
            if entry.low is None or entry.high is None:
                emit(f"{task} {metric}: {entry.value:.4g}")
            else:
                of = f"{len(judged.prompts)} prompts ({entry.low:.1%} to {entry.high:.1%})"
                emit(f"{task} {metric}: {entry.value:.1%} of {of}")
    for difference in differences:
        low, value, high = (
            f"{share * 100:+.1f}"
            for share in (difference.accuracy.low, difference.accuracy.difference, difference.accuracy.high)
        )
        emit(
            f"{difference.task} {difference.metric} minus {options.against}: {value} points ({low} to {high}), "
            f"McNemar p {difference.tests.mcnemar_p:.3g}"
        )
    return FINE


def _load(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Load the model as a recipe says, or as it is stored; an adapter has its base from the recipe."""
    from subnet_ft.checkpoints import open_checkpoint
    from subnet_ft.inputs import RunInputs
    from subnet_ft.masks.provenance import narrowest_dtype
    from subnet_ft.methods.saved import is_adapter, load_trained

    path = Path(options.model)
    if options.recipe is None:
        if is_adapter(path):
            raise SubnetError(f"`{path}` is an adapter. Name the recipe that trained it, for its base, after it.")
        checkpoint = open_checkpoint(options.model)
        dtype = narrowest_dtype(spec.dtype for spec in checkpoint.specs.values())
        return *load_trained(checkpoint.folder, checkpoint.folder, dtype=dtype), {}
    recipe = recipe_to_judge(options.recipe, options.overrides)
    inputs = RunInputs(recipe)
    folder = path if is_adapter(path) else open_checkpoint(options.model).folder
    loading: dict[str, Any] = {
        "dtype": recipe.model.dtype,
        "attn_implementation": recipe.model.attn_implementation,
    }
    settings = {"confidence": recipe.evaluation.confidence, "batch_size": recipe.evaluation.batch_size}
    return *load_trained(folder, inputs.base.folder if is_adapter(path) else folder, **loading), settings
