"""`subnet-ft run` and `subnet-ft train`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from subnet_ft import __version__
from subnet_ft.cli.results import FINE, VERIFICATION_FAILED, Emit, check_folder
from subnet_ft.processes import check_equal, check_shared, everywhere

if TYPE_CHECKING:
    from subnet_ft.pipeline import Pipeline
    from subnet_ft.recipe import Recipe


def run(options: argparse.Namespace, emit: Emit) -> int:
    """Do a whole run and print its verdict."""
    from subnet_ft.evidence.report import lines_for_terminal, summary_for_cli
    from subnet_ft.stages import lock_run
    from subnet_ft.verification import has_failed

    pipeline = checked_pipeline(options, emit)
    if pipeline is None:
        return FINE
    with lock_run(pipeline.folder):
        report = pipeline.run()
    if options.json:
        emit(json.dumps({**summary_for_cli(report), "output": str(pipeline.folder)}))
    else:
        emit("\n".join([*lines_for_terminal(report), "", f"  Report: {pipeline.folder / 'report.html'}"]))
    return VERIFICATION_FAILED if has_failed(report) else FINE


def train(options: argparse.Namespace, emit: Emit) -> int:
    """Train one method and print what was measured."""
    from subnet_ft.stages import lock_run

    pipeline = checked_pipeline(options, emit)
    if pipeline is None:
        return FINE
    with lock_run(pipeline.folder):
        stage = pipeline.train()
    method = pipeline.recipe.method
    result = {"version": __version__, "method": method, "folder": str(stage.folder), **stage.results}
    if options.json:
        emit(json.dumps(result))
    else:
        emit(
            f"{method}: {result['num_steps']} steps in {result['train_seconds']:.0f} s, density "
            f"{result['density']:.4f}, saved in {stage.folder}"
        )
    return FINE


def checked_pipeline(
    options: argparse.Namespace, emit: Emit, *, methods: Sequence[str] = (), quantizations: Sequence[str] = ()
) -> Pipeline | None:
    """Check recipe, launch and output folder; `None` after a dry run, which ends with the recipe.

    Every process of a launch checks them, and they must agree.

    Args:
        options: The command line.
        emit: Writes to stdout.
        methods: What will be trained; the recipe's own `method` when there are none.
        quantizations: Of copies that will be judged.
    """
    from subnet_ft.environment import environment
    from subnet_ft.pipeline import Pipeline, load_checked_recipe
    from subnet_ft.recipe import recipe_to_dict
    from subnet_ft.training.launch_check import check_launch, refuse_many_devices

    def load() -> Recipe:
        return load_checked_recipe(options.recipe, options.overrides, methods=methods, quantizations=quantizations)

    recipe = everywhere("recipe", load)
    check_equal("recipe", {**recipe_to_dict(recipe), "overwrite": options.overwrite})
    check_equal("versions", environment()["packages"])
    check_launch(recipe, methods)
    if options.dry_run:
        if options.json:
            emit(json.dumps({"version": __version__, "recipe": recipe_to_dict(recipe)}))
        else:
            emit(f"`{options.recipe}` is fine: {recipe.algorithm} on {recipe.model.name}, into {recipe.output}")
        return None
    refuse_many_devices()
    everywhere("output folder", lambda: check_folder(Path(recipe.output)))
    check_shared(Path(recipe.output))
    return Pipeline(recipe, overwrite=options.overwrite, progress=not options.quiet)
