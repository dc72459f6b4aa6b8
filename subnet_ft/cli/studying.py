"""`subnet-ft study`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from subnet_ft import __version__
from subnet_ft.cli.results import FINE, Emit, check_folder


def study(options: argparse.Namespace, emit: Emit) -> int:
    """Do the runs of a study that are not done yet, and print what they say together."""
    from subnet_ft.studies.names import study_name

    name = study_name(options.name)
    from subnet_ft.evidence.report.wording import duration
    from subnet_ft.studies.plans import plan_study
    from subnet_ft.studies.timing import measured_step_seconds, total_steps
    from subnet_ft.training.launch_check import refuse_many_devices, refuse_many_processes

    refuse_many_processes("study")
    plan = plan_study(name, options.recipe, options.overrides)
    if options.only:
        plan = plan.only(options.only)
    if options.dry_run:
        steps, per_step = total_steps(plan.cells), measured_step_seconds(plan)
        cells = [{"name": cell.name, "label": cell.label, "num_steps": cell.num_steps} for cell in plan.cells]
        if options.json:
            found = {"version": __version__, "study": name, "cells": cells, "num_steps": steps, "notes": plan.notes}
            emit(json.dumps({**found, "step_seconds": per_step}))
            return FINE
        emit(f"study {name}: {len(cells)} cells, {steps:,} steps, into {plan.folder}")
        for cell in plan.cells:
            done = ", done before" if cell.is_done else ""
            emit(f"  {cell.name}: {cell.label}, {cell.num_steps} steps{done}")
        left = total_steps([cell for cell in plan.cells if not cell.is_done])
        time = "known after the first cell" if per_step is None else f"about {duration(per_step * left)}"
        emit(f"Time: {time}.")
        return FINE
    refuse_many_devices()
    check_folder(Path(plan.recipe.output))
    from subnet_ft.stages import lock_run
    from subnet_ft.studies.execution import Study
    from subnet_ft.studies.write import lines_for_terminal, summary_for_cli, write_study

    with lock_run(Path(plan.recipe.output)):
        report = Study(plan, overwrite=options.overwrite, progress=not options.quiet).run()
        files = write_study(report, plan.folder)
    if options.json:
        emit(json.dumps({**summary_for_cli(report), "output": str(plan.folder)}))
    else:
        emit("\n".join([*lines_for_terminal(report), "", f"  Study: {files['html']}"]))
    return FINE
