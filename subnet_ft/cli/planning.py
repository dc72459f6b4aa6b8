"""`subnet-ft plan`: what a recipe will need, from configs alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from subnet_ft import __version__
from subnet_ft.cli.results import FINE, Emit, recipe_to_judge
from subnet_ft.errors import PlanError

if TYPE_CHECKING:
    from subnet_ft.recipe import Recipe


def plan(options: argparse.Namespace, emit: Emit) -> int:
    """Print a plan; it is fine when something does not fit, because that is what a plan is for."""
    from subnet_ft.plan import Request, advise, lines_for_terminal, make_plan, parse_memory, plan_to_dict

    if options.sizes:
        return _sizes(options, emit)
    if options.recipe is None:
        raise PlanError("Name a recipe: `subnet-ft plan RECIPE`. `subnet-ft recipes` lists those that ship.")
    methods, shardings, overrides = _words(options)
    request = Request(
        gpus=options.gpus,
        memory=None if options.memory is None else parse_memory(options.memory),
        shardings=shardings,
        methods=methods,
        density=options.density,
        mask=None if options.mask is None else Path(options.mask),
        prompt_tokens=options.prompt_tokens,
        tokens=options.tokens,
        device=options.device,
    )

    def load(overrides: Sequence[str]) -> Recipe:
        return recipe_to_judge(options.recipe, overrides)

    made = make_plan(load, request, overrides)
    advice = {row: advise(load, overrides, request, row) for row in made.rows if row.fits is False}
    if options.json:
        emit(json.dumps(plan_to_dict(made, advice)))
    else:
        emit("\n".join(lines_for_terminal(made, advice)))
    return FINE


def _words(options: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
    """Return methods, ways to shard and overrides, which an option of several values takes along."""
    methods = [word for given in options.method for word in given.split(",") if "=" not in given]
    shardings = [word for given in options.sharding for word in given.split(",") if "=" not in given]
    taken = [given for given in (*options.method, *options.sharding) if "=" in given]
    return tuple(methods), tuple(shardings), [*options.overrides, *taken]


def _sizes(options: argparse.Namespace, emit: Emit) -> int:
    from subnet_ft.plan import sizes_table

    if options.recipe is not None:
        raise PlanError("--sizes is the table of docs/plan.md, whose setting is its own. Leave out the recipe.")
    table = sizes_table()
    emit(json.dumps({"version": __version__, "table": table}) if options.json else table)
    return FINE


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("recipe", nargs="?", help="recipe file or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields to change")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks, one per GPU; 1")
    parser.add_argument("--memory", metavar="SIZE", help="of one GPU, such as 24GB: say what fits, and what would")
    parser.add_argument(
        "--sharding", nargs="+", default=[], metavar="S", help="none, ddp, fsdp2, fsdp2_offload; ddp and fsdp2"
    )
    parser.add_argument(
        "--method", nargs="+", default=[], metavar="M", help="full, subnet, lora, ... (docs/plan.md); these three"
    )
    parser.add_argument("--density", type=float, metavar="D", help="of the mask, if the recipe does not say it")
    parser.add_argument("--mask", metavar="FILE", help="or the mask itself, NAME.subnet.safetensors")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="of the longest prompt")
    parser.add_argument("--tokens", type=int, metavar="N", help="of the longest sequence of data that are read")
    parser.add_argument("--device", default="cuda", help="cuda (the default) or cpu")
    parser.add_argument("--sizes", action="store_true", help="the table of 1.5B to 70B on 1 to 64 GPUs, no recipe")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
