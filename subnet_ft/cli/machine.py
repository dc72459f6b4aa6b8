"""`subnet-ft recipes`, `subnet-ft env` and `subnet-ft bench`."""

from __future__ import annotations

import argparse
import json

from subnet_ft import __version__
from subnet_ft.cli.results import FINE, VERIFICATION_FAILED, Emit
from subnet_ft.errors import SubnetError


def densities(text: str) -> tuple[float, ...]:
    """Read densities such as `0.1,0.2`."""
    values = tuple(float(part) for part in text.split(","))
    if not all(0.0 < value <= 1.0 for value in values):
        raise argparse.ArgumentTypeError(f"densities lie in (0, 1], got {text}")
    return values


def bench(options: argparse.Namespace, emit: Emit) -> int:
    """Measure and print one table; exit code 1 if a kernel gives a wrong result."""
    from subnet_ft.bench import PARTS, lines_for_terminal, run_bench

    parts = options.only or PARTS
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise SubnetError(f"`{unknown[0]}` is no part of the bench; choose among {', '.join(PARTS)}.")
    if options.repeats < 1 or options.layers < 1:
        raise SubnetError(f"--repeats and --layers must be at least 1, got {options.repeats} and {options.layers}.")
    choice = {} if options.densities is None else {"densities": options.densities}
    result = run_bench(parts, num_layers=options.layers, repeats=options.repeats, **choice)
    if options.json:
        emit(json.dumps({"version": __version__, **result}))
    else:
        emit("\n".join(lines_for_terminal(result)))
    return VERIFICATION_FAILED if result["refused"] else FINE


def recipes(options: argparse.Namespace, emit: Emit) -> int:
    """List the recipes that come with the package."""
    from subnet_ft.recipe import shipped_recipes

    shipped = shipped_recipes()
    if options.json:
        emit(json.dumps({"version": __version__, "recipes": dict(shipped)}))
    else:
        width = max(len(name) for name, _ in shipped)
        emit("\n".join(f"{name:<{width}}  {summary}" for name, summary in shipped))
    return FINE


def env(options: argparse.Namespace, emit: Emit) -> int:
    """Print versions and hardware."""
    from subnet_ft.environment import environment

    found = environment()
    if options.json:
        emit(json.dumps({"version": __version__, **found}))
    else:
        rows = {**{key: value for key, value in found.items() if key != "packages"}, **found["packages"]}
        emit("\n".join(f"{key:<16} {'not found' if value is None else value}" for key, value in rows.items()))
    return FINE
