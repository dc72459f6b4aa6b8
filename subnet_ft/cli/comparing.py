"""`subnet-ft compare`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from subnet_ft.cli.results import FINE, Emit
from subnet_ft.cli.training import checked_pipeline
from subnet_ft.errors import SubnetError
from subnet_ft.processes import first_alone, is_first

QUANTIZATIONS = ("int8", "nf4")


def names(text: str) -> list[str]:
    """Read names such as `full,lora`, each of them once."""
    found = [part.strip() for part in text.split(",")]
    if "" in found:
        raise argparse.ArgumentTypeError(f"names are separated by single commas, got `{text}`")
    doubled = [name for index, name in enumerate(found) if name in found[:index]]
    if doubled:
        raise argparse.ArgumentTypeError(f"`{doubled[0]}` is listed twice")
    return found


def compare_methods(options: argparse.Namespace, emit: Emit) -> int:
    """Train several methods on one recipe and print them beside each other."""
    from subnet_ft.recipe.methods import METHODS

    _check_names("method", options.methods, METHODS)
    _check_names("quantization", options.quantized, QUANTIZATIONS)
    pipeline = checked_pipeline(options, emit, methods=options.methods, quantizations=options.quantized)
    if pipeline is None:
        return FINE
    from subnet_ft.comparison import compare
    from subnet_ft.evidence.comparison import lines_for_terminal, summary_for_cli, write_comparison
    from subnet_ft.stages import lock_run

    files: dict[str, Path] = {}
    with lock_run(pipeline.folder):
        comparison = compare(pipeline, options.methods, quantizations=options.quantized)
        first_alone("comparison", lambda: files.update(write_comparison(comparison, pipeline.folder)))
    if not is_first():
        return FINE
    if options.json:
        emit(json.dumps({**summary_for_cli(comparison), "output": str(pipeline.folder)}))
    else:
        emit("\n".join([*lines_for_terminal(comparison), "", f"  Comparison: {files['html']}"]))
    return FINE


def _check_names(what: str, given: Sequence[str], known: Collection[str]) -> None:
    from subnet_ft.recipe.parsing import did_you_mean

    for name in given:
        if name not in known:
            raise SubnetError(f"`{name}` is no {what}{did_you_mean(name, known) or '; known: ' + ', '.join(known)}.")
