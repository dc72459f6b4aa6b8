"""`subnet-ft evaluate` and `subnet-ft verify`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from subnet_ft import __version__
from subnet_ft.cli.harness import evaluate_with_lm_eval
from subnet_ft.cli.results import FINE, VERIFICATION_FAILED, Emit, check_folder, recipe_to_judge
from subnet_ft.errors import RecipeError, SubnetError


def evaluate(options: argparse.Namespace, emit: Emit) -> int:
    """Print the accuracy of a model on held-out prompts, or on held-out pairs if it is a reward model."""
    from subnet_ft.checkpoints import open_checkpoint
    from subnet_ft.evidence.statistics import wilson_interval
    from subnet_ft.held_out import HeldOutPairs, held_out, judge
    from subnet_ft.inputs import RunInputs
    from subnet_ft.methods.saved import is_adapter

    if options.lm_eval is not None:
        return evaluate_with_lm_eval(options, emit)
    _refuse_what_lm_eval_takes(options)
    recipe = recipe_to_judge(options.recipe, options.overrides)
    path = Path(options.model)
    folder = path if is_adapter(path) else open_checkpoint(options.model).folder
    inputs = RunInputs(recipe)
    judged_on = held_out(inputs, progress=not options.quiet)
    if judged_on is None:
        raise RecipeError(str(options.recipe), ["evaluation.enabled: is false, so there are no held-out prompts"])
    records = judge(folder, inputs, judged_on, progress=not options.quiet)
    is_pairs = isinstance(judged_on, HeldOutPairs)
    task = recipe.task if is_pairs else recipe.evaluation.task or recipe.task
    what = "pairs" if is_pairs else "prompts"
    correct, total = sum(record["correct"] for record in records), len(records)
    low, high = wilson_interval(correct, total, recipe.evaluation.confidence)
    if options.json:
        figures = {"accuracy": correct / total, f"num_{what}": total, "ci_low": low, "ci_high": high}
        emit(json.dumps({"version": __version__, "model": options.model, "task": task.name, **figures}))
    else:
        emit(f"{options.model}: {correct / total:.1%} of {total} {what} ({low:.1%} to {high:.1%})")
    return FINE


def verify_run(options: argparse.Namespace, emit: Emit) -> int:
    """Judge checkpoints that already exist."""
    from subnet_ft.evidence.report import lines_for_terminal, summary_for_cli
    from subnet_ft.verification import has_failed, verify

    if options.output is not None:
        check_folder(Path(options.output))
    report = verify(
        options.base,
        options.full,
        options.subnet,
        options.mask,
        recipe=recipe_to_judge(options.recipe) if options.recipe else None,
        output=options.output,
        progress=not options.quiet,
    )
    emit(json.dumps(summary_for_cli(report)) if options.json else "\n".join(lines_for_terminal(report)))
    return VERIFICATION_FAILED if has_failed(report) else FINE


def _refuse_what_lm_eval_takes(options: argparse.Namespace) -> None:
    if options.recipe is None:
        raise SubnetError("`subnet-ft evaluate MODEL` needs a recipe to judge by, or --lm-eval TASK.")
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("limit", "chat", "tasks_from", "output", "against")
        if getattr(options, name) not in (None, False)
    ]
    if given:
        raise SubnetError(f"{', '.join(given)} goes with --lm-eval TASK, not with a recipe's prompts. Remove it.")
