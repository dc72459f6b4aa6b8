"""The commands and their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from subnet_ft import __version__
from subnet_ft.cli import delta_hub, deltas
from subnet_ft.cli.comparing import compare_methods, names
from subnet_ft.cli.judging import evaluate, verify_run
from subnet_ft.cli.machine import bench, densities, env, recipes
from subnet_ft.cli.making import KINDS, RULES, combine_masks, make_mask
from subnet_ft.cli.masks import extract_mask, mask_info
from subnet_ft.cli.overlapping import mask_overlap
from subnet_ft.cli.planning import add_plan, plan
from subnet_ft.cli.studying import study
from subnet_ft.cli.training import run, train

_EXIT_CODES = "Exit codes: 0 fine, 1 a verification failed, 2 wrong usage or input, 3 unexpected error."


_DELTA_OUTPUT = "NAME.delta.safetensors to write; a file of that name is replaced"
_DELTA = "a NAME.delta.safetensors file or hub:OWNER/NAME[@REVISION]"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line; wrong usage prints a message and exits with 2."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives up on `key=value` behind an option; they are overrides wherever they stand.
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="subnet-ft",
        description="Finetune only the subnetwork that reinforcement learning really changes.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"subnet-ft {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run_command = _command(
        commands, run, "run", "full run, mask, subnetwork run, controls, report; finished stages are kept"
    )
    _recipe_arguments(run_command)
    run_command.add_argument("--json", action="store_true", help="print the verdict as one JSON object")

    train_command = _command(commands, train, "train", "one run: `method=full`, `method=subnet`, `method=lora`, ...")
    _recipe_arguments(train_command)
    train_command.add_argument("--json", action="store_true", help="print what was measured as one JSON object")

    compare_command = _command(
        commands, compare_methods, "compare", "several methods on one recipe, with equal data, seed and steps"
    )
    _recipe_arguments(compare_command)
    compare_command.add_argument(
        "--methods", type=names, required=True, metavar="A,B,C", help="such as full,subnet,lora (docs/methods.md)"
    )
    compare_command.add_argument(
        "--quantized", type=names, default=[], metavar="Q", help="judge quantized copies of the results, too: int8,nf4"
    )
    compare_command.add_argument("--json", action="store_true", help="print the table as one JSON object")

    study_command = _command(
        commands, study, "study", "a question of the paper at your own scale: many resumable runs, one page"
    )
    study_command.add_argument("name", metavar="NAME", help="sparsity, overlap, causes, which_mask or early_mask")
    _recipe_arguments(study_command)
    study_command.add_argument(
        "--only", type=names, default=[], metavar="CELL,...", help="only these runs of it; --dry-run lists them"
    )
    study_command.add_argument("--json", action="store_true", help="print what it says as one JSON object")

    extract_command = _command(
        commands, extract_mask, "extract", "write the mask of the weights that differ between two checkpoints"
    )
    extract_command.add_argument("base", help="folder, Hub id, .gguf file, package:MODULE/FILE.gguf or tiny:FAMILY")
    extract_command.add_argument("tuned", help="the same, after training")
    _output_argument(extract_command)
    extract_command.add_argument("--criterion", choices=["exact", "absolute", "relative"], default="exact")
    extract_command.add_argument("--tolerance", type=float, default=0.0, help="of the criteria absolute and relative")
    extract_command.add_argument("--dtype", help="compare in this dtype instead of the stored one")
    extract_command.add_argument("--json", action="store_true", help="print the mask's figures as one JSON object")

    _mask_commands(commands)
    _delta_commands(commands)

    evaluate_command = _command(commands, evaluate, "evaluate", "accuracy of a model on a recipe's held-out prompts")
    evaluate_command.add_argument("model", help="folder or other name of a model")
    evaluate_command.add_argument(
        "recipe",
        nargs="?",
        help="recipe file or the name of a shipped recipe; with --lm-eval only for its model section",
    )
    evaluate_command.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields to change")
    evaluate_command.add_argument(
        "--lm-eval", type=names, metavar="TASK,...", help="judge on these tasks of lm-eval instead (docs/lm_eval.md)"
    )
    evaluate_command.add_argument("--limit", type=int, metavar="N", help="the first N prompts of each of these tasks")
    evaluate_command.add_argument("--chat", action="store_true", help="render their prompts with the chat template")
    evaluate_command.add_argument("--tasks-from", metavar="DIR", help="folder of further tasks in lm-eval's YAML")
    evaluate_command.add_argument("-o", "--output", metavar="FILE", help="save their outcomes, prompt by prompt")
    evaluate_command.add_argument("--against", metavar="FILE", help="such a file of another model, to compare with")
    evaluate_command.add_argument("--json", action="store_true", help="print one JSON object")

    verify_command = _command(commands, verify_run, "verify", "judge whether a subnetwork run recovered a full run")
    for name, what in (
        ("base", "base model"),
        ("full", "full run"),
        ("subnet", "subnetwork run"),
        ("mask", "mask file"),
    ):
        verify_command.add_argument(f"--{name}", required=True, help=what)
    verify_command.add_argument("--recipe", help="measure accuracy on this recipe's held-out prompts")
    verify_command.add_argument(
        "-o", "--output", metavar="DIR", help="write report.html, report.md and report.json there"
    )
    verify_command.add_argument("--json", action="store_true", help="print one JSON object")

    add_plan(_command(commands, plan, "plan", "memory, traffic and what fits, from configs alone; no weight is read"))

    bench_command = _command(
        commands, bench, "bench", "times and bytes of our kernels beside torch's own, in one table"
    )
    bench_command.add_argument(
        "--only", metavar="PART", action="append", help="step, extract, memory or overhead; may be repeated"
    )
    bench_command.add_argument("--densities", type=densities, help="of the masks of `step`, such as 0.1,0.2")
    bench_command.add_argument(
        "--layers", type=int, default=30, help="decoder layers of SmolLM2-135M; 30 is the whole model"
    )
    bench_command.add_argument("--repeats", type=int, default=7, help="timed runs per row")
    bench_command.add_argument("--json", action="store_true", help="print one JSON object")

    recipes_command = _command(commands, recipes, "recipes", "list the recipes that come with subnet-ft")
    recipes_command.add_argument("--json", action="store_true", help="print one JSON object")
    env_command = _command(commands, env, "env", "versions and hardware, for a bug report")
    env_command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _mask_commands(commands: Any) -> None:
    mask = commands.add_parser("mask", help="make masks, look at them", description="Make masks and look at them.")
    mask_commands = mask.add_subparsers(title="commands", metavar="COMMAND", required=True)
    info_command = _command(mask_commands, mask_info, "info", "what a mask file holds")
    info_command.add_argument("mask", help="a NAME.subnet.safetensors file")
    info_command.add_argument("--json", action="store_true", help="print one JSON object")

    overlap_command = _command(mask_commands, mask_overlap, "overlap", "what masks have in common, beside both nulls")
    overlap_command.add_argument("masks", nargs="+", metavar="MASK", help="NAME.subnet.safetensors files, two or more")
    overlap_command.add_argument("--base", help="the masks' base model, for the magnitude-matched null")
    overlap_command.add_argument(
        "-o", "--output", metavar="DIR", help="write overlap.html, overlap.md and overlap.json there"
    )
    overlap_command.add_argument("--json", action="store_true", help="print one JSON object")

    make_command = _command(mask_commands, make_mask, "make", "a mask from base weights, first steps or another mask")
    make_command.description = f"Make a mask (docs/masks.md). KIND is one of {', '.join(KINDS)}."
    make_command.add_argument("kind", metavar="KIND", choices=KINDS, help="where the mask comes from")
    _output_argument(make_command)
    make_command.add_argument("--like", metavar="MASK", help="choose as many weights per tensor as this mask does")
    make_command.add_argument("--density", type=float, metavar="D", help="or this share of the weights")
    make_command.add_argument("--base", help="the base model; with --like, if not the one that MASK names")
    make_command.add_argument("--seed", type=int, help="of what is drawn, and of the order of equal weights; 0")
    make_command.add_argument("--dtype", help="in which the weights are trained, if not the stored one")
    make_command.add_argument("--rank", type=int, help="of (non_)principal's approximation; 1/32 of a matrix's side")
    make_command.add_argument("--scope", help="of uniform, gradient, fisher: tensor (the default) or global")
    make_command.add_argument("--reach", type=float, help="of predicted, instead of a density: the expected drift")
    make_command.add_argument("--state", metavar="CHECKPOINT", help="of forecast, gradient, fisher: of a full run")
    make_command.add_argument("--recall", type=float, help="of forecast, instead of a density: expected share to cover")
    make_command.add_argument("--total-steps", type=int, metavar="N", help="of forecast: of the run, if not as planned")
    make_command.add_argument("--tuned", metavar="CHECKPOINT", help="of early: a checkpoint-STEP folder of a run")
    make_command.add_argument("--criterion", help="of early: exact (the default), absolute or relative")
    make_command.add_argument("--tolerance", type=float, help="of the criteria absolute and relative")
    make_command.add_argument("--json", action="store_true", help="print the mask's figures as one JSON object")

    combine_command = _command(mask_commands, combine_masks, "combine", "one mask from the masks of several runs")
    combine_command.add_argument("rule", metavar="RULE", choices=RULES, help=", ".join(RULES))
    combine_command.add_argument("masks", nargs="+", metavar="MASK", help="NAME.subnet.safetensors files, two or more")
    _output_argument(combine_command)
    combine_command.add_argument("--at-least", type=int, metavar="K", help="masks that make a majority; more than half")
    combine_command.add_argument("--json", action="store_true", help="print the mask's figures as one JSON object")


def _delta_commands(commands: Any) -> None:
    delta = commands.add_parser("delta", help="sparse checkpoints", description="Make and use sparse checkpoints.")
    delta_commands = delta.add_subparsers(title="commands", metavar="COMMAND", required=True)
    export = _command(delta_commands, deltas.export, "export", "write what training changed (docs/deltas.md)")
    export.add_argument("base", help="folder, Hub id, .gguf file, package:MODULE/FILE.gguf or tiny:FAMILY")
    export.add_argument("tuned", help="the same, after training of any kind")
    _delta_output(export)
    export.add_argument("--mask", help="store the values of exactly these weights, changed or not")
    export.add_argument("--mask-reference", action="store_true", help="store no positions, only the mask's fingerprint")

    apply = _command(delta_commands, deltas.apply, "apply", "make the tuned checkpoint out of the base")
    apply.add_argument("base", type=_not_empty, help="the base that the delta was made for; with --in-place, a folder")
    apply.add_argument("deltas", nargs="+", metavar="DELTA", help=f"{_DELTA}, or a chain of them in order")
    place = apply.add_mutually_exclusive_group(required=True)
    place.add_argument("-o", "--output", metavar="DIR", help="the new folder")
    place.add_argument("--in-place", action="store_true", help="change the base's folder; `revert` undoes it")

    revert = _command(delta_commands, deltas.revert, "revert", "undo the last `apply --in-place`, byte for byte")
    revert.add_argument("folder", type=_not_empty, help="the folder that a delta was applied to")

    info = _command(delta_commands, deltas.info, "info", "what a delta file holds")
    info.add_argument("delta", help=_DELTA)

    diff = _command(delta_commands, deltas.diff, "diff", "what two deltas of one base have in common")
    compose = _command(delta_commands, deltas.compose, "compose", "one delta that does what two do")
    for both in (diff, compose):
        both.add_argument("first", help=_DELTA)
        both.add_argument(
            "second", help="another one of the same base" + (", or of the first's result" * (both is compose))
        )
    _delta_output(compose)
    compose.add_argument("--base", help="their base, if not the folder that the first names")
    compose.add_argument(
        "--on-conflict", choices=["error", "first", "second"], default="error", help="whose value counts"
    )

    verify = _command(
        delta_commands, deltas.verify, "verify", "whether a delta belongs to a base and a tuned checkpoint"
    )
    verify.add_argument("base", help="the base")
    verify.add_argument("delta", help=_DELTA)
    verify.add_argument("tuned", nargs="?", help="what base and delta should make")
    shira = _command(
        delta_commands, deltas.to_shira, "to-shira", "make a SHiRA adapter for PEFT (docs/deltas.md, Interchange)"
    )
    shira.add_argument("base", help="the base that the delta was made for")
    shira.add_argument("delta", help=_DELTA)
    shira.add_argument("-o", "--output", required=True, metavar="DIR", help="the new folder")
    shira.add_argument("--pad", action="store_true", help="fill layers up to r (in + out) with unchanged weights")
    push = _command(delta_commands, delta_hub.push, "push", "upload a delta to the Hub, with a model card")
    push.add_argument("delta", help="a NAME.delta.safetensors file")
    push.add_argument("repo", help="Hub id, owner/name; made if it is not there")
    push.add_argument("--report", metavar="PATH", help="report.json, or its folder: the card carries its verdict")
    push.add_argument("--private", action="store_true", help="make a private repository")
    pull = _command(delta_commands, delta_hub.pull, "pull", "download the delta of a Hub repository")
    pull.add_argument("repo", help="Hub id, owner/name")
    pull.add_argument("-o", "--output", required=True, metavar="FILE", help=_DELTA_OUTPUT)
    pull.add_argument("--revision", help="branch, tag or commit")
    for command in (export, apply, compose, verify, shira):
        command.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of a base on the Hub")
    for command in (apply, diff, compose, verify, shira):
        command.add_argument(
            "--mask", action="append", default=[], help="the mask file of a delta without positions; may be repeated"
        )
    for command in (export, apply, revert, info, diff, compose, verify, shira, push, pull):
        command.add_argument("--json", action="store_true", help="print one JSON object")


def _not_empty(name: str) -> str:
    if not name:  # an unset variable of a script, which as a path would be the working folder
        raise argparse.ArgumentTypeError("it is empty; name a checkpoint, or `.` for this folder")
    return name


def _delta_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=_DELTA_OUTPUT)
    parser.add_argument("--zstd", action="store_true", help="compress (needs the extra `zstd`)")


def _output_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, metavar="MASK", help="NAME.subnet.safetensors to write")


def _command(commands: Any, function: Callable[..., int], name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("-q", "--quiet", action="store_true", help="only warnings and the result")
    parser.set_defaults(command=function)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="recipe file or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields to change")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and stop before any weight is loaded")
    parser.add_argument("--overwrite", action="store_true", help="replace stages that were made with other settings")
