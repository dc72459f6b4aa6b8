"""The command line: `subnet-ft COMMAND`. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subnet_ft import __version__
from subnet_ft.errors import RecipeError, SubnetError

if TYPE_CHECKING:
    from subnet_ft.masks import SubnetMask
    from subnet_ft.pipeline import Pipeline
    from subnet_ft.recipe import Recipe

logger = logging.getLogger(__name__)

FINE, VERIFICATION_FAILED, WRONG_INPUT, UNEXPECTED = 0, 1, 2, 3
_EXIT_CODES = "Exit codes: 0 fine, 1 a verification failed, 2 wrong usage or input, 3 unexpected error."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, one of those above; only an unexpected error shows a traceback."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # What transformers deprecates inside TRL is nothing that a user of this command can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)(\.|$)")
    logging.getLogger("subnet_ft").setLevel(logging.WARNING if options.quiet else logging.INFO)
    try:
        with _stdout_for_results() as emit:
            code: int = options.command(options, emit)
            return code
    except SubnetError as error:
        sys.stderr.write(f"{error}\n")
        return WRONG_INPUT
    except OSError as error:
        named = f"{error.strerror}: `{error.filename}`" if error.strerror and error.filename else str(error)
        sys.stderr.write(f"{named or type(error).__name__}\n")
        return WRONG_INPUT
    except KeyboardInterrupt:
        goes_on = " The same command goes on from here." if options.command in (_run, _train) else ""
        sys.stderr.write(f"\nInterrupted.{goes_on}\n")
        return 130
    except Exception:  # a bug, or something that torch, transformers or TRL refuses
        logger.exception("Unexpected error. If it is not yours, report it with the output of `subnet-ft env`:")
        return UNEXPECTED


Emit = Callable[[str], None]


@contextlib.contextmanager
def _stdout_for_results() -> Iterator[Emit]:
    """Send what libraries print to stderr; only what is emitted reaches stdout."""
    stdout = sys.stdout

    def emit(text: str) -> None:
        stdout.write(text + "\n")
        stdout.flush()

    with contextlib.redirect_stdout(sys.stderr):
        yield emit


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
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

    run = _command(commands, _run, "run", "full run, mask, subnetwork run, controls, report; finished stages are kept")
    _recipe_arguments(run)
    run.add_argument("--json", action="store_true", help="print the verdict as one JSON object")

    train = _command(commands, _train, "train", "one run: `method=full` or `method=subnet`")
    _recipe_arguments(train)
    train.add_argument("--json", action="store_true", help="print what was measured as one JSON object")

    extract = _command(
        commands, _extract, "extract", "write the mask of the weights that differ between two checkpoints"
    )
    extract.add_argument("base", help="folder, Hub id, .gguf file, package:MODULE/FILE.gguf or tiny:FAMILY")
    extract.add_argument("tuned", help="the same, after training")
    extract.add_argument("-o", "--output", required=True, metavar="MASK", help="NAME.subnet.safetensors to write")
    extract.add_argument("--criterion", choices=["exact", "absolute", "relative"], default="exact")
    extract.add_argument("--tolerance", type=float, default=0.0, help="of the criteria absolute and relative")
    extract.add_argument("--dtype", help="compare in this dtype instead of the stored one")
    extract.add_argument("--json", action="store_true", help="print the mask's figures as one JSON object")

    mask = commands.add_parser("mask", help="look at masks", description="Look at masks.")
    mask_commands = mask.add_subparsers(title="commands", metavar="COMMAND", required=True)
    info = _command(mask_commands, _mask_info, "info", "what a mask file holds")
    info.add_argument("mask", help="a NAME.subnet.safetensors file")
    info.add_argument("--json", action="store_true", help="print one JSON object")

    evaluate = _command(commands, _evaluate, "evaluate", "accuracy of a model on a recipe's held-out prompts")
    evaluate.add_argument("model", help="folder or other name of a model")
    evaluate.add_argument("recipe", help="recipe file or the name of a shipped recipe")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields to change")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    verify = _command(commands, _verify, "verify", "judge whether a subnetwork run recovered a full run")
    for name, what in (
        ("base", "base model"),
        ("full", "full run"),
        ("subnet", "subnetwork run"),
        ("mask", "mask file"),
    ):
        verify.add_argument(f"--{name}", required=True, help=what)
    verify.add_argument("--recipe", help="measure accuracy on this recipe's held-out prompts")
    verify.add_argument("-o", "--output", metavar="DIR", help="write report.html, report.md and report.json there")
    verify.add_argument("--json", action="store_true", help="print one JSON object")

    recipes = _command(commands, _recipes, "recipes", "list the recipes that come with subnet-ft")
    recipes.add_argument("--json", action="store_true", help="print one JSON object")
    env = _command(commands, _env, "env", "versions and hardware, for a bug report")
    env.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


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


def _run(options: argparse.Namespace, emit: Emit) -> int:
    from subnet_ft.evidence.report import lines_for_terminal, summary_for_cli
    from subnet_ft.stages import lock_run
    from subnet_ft.verification import has_failed

    pipeline = _checked_pipeline(options, emit)
    if pipeline is None:
        return FINE
    with lock_run(pipeline.folder):
        report = pipeline.run()
    if options.json:
        emit(json.dumps({**summary_for_cli(report), "output": str(pipeline.folder)}))
    else:
        emit("\n".join([*lines_for_terminal(report), "", f"  Report: {pipeline.folder / 'report.html'}"]))
    return VERIFICATION_FAILED if has_failed(report) else FINE


def _train(options: argparse.Namespace, emit: Emit) -> int:
    from subnet_ft.stages import lock_run

    pipeline = _checked_pipeline(options, emit)
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


def _checked_pipeline(options: argparse.Namespace, emit: Emit) -> Pipeline | None:
    """Check recipe, launch and output folder; `None` after a dry run, which ends with the recipe."""
    from subnet_ft.pipeline import Pipeline, load_checked_recipe
    from subnet_ft.recipe import recipe_to_dict
    from subnet_ft.training.one_process import refuse_many_devices, refuse_many_processes

    refuse_many_processes()
    recipe = load_checked_recipe(options.recipe, options.overrides)
    if options.dry_run:
        if options.json:
            emit(json.dumps({"version": __version__, "recipe": recipe_to_dict(recipe)}))
        else:
            emit(f"`{options.recipe}` is fine: {recipe.algorithm} on {recipe.model.name}, into {recipe.output}")
        return None
    refuse_many_devices()
    _check_folder(Path(recipe.output))
    return Pipeline(recipe, overwrite=options.overwrite, progress=not options.quiet)


def _recipe_to_judge(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe where nothing is trained, so that the machine need not have what training needs."""
    from subnet_ft.recipe import load_recipe
    from subnet_ft.training import config_fields

    return load_recipe(path, overrides, algorithms=config_fields())


def _check_folder(path: Path) -> None:
    """Check that files can be made in a folder, which may not exist yet, before the work whose results it will hold."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        # Only making a file tells: root may do what the permissions of /proc or of a read-only disk seem to allow.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = "is a file" if existing.is_file() else f"cannot be written to ({error.strerror})"
        raise SubnetError(f"`{path}` cannot be an output folder: `{existing}` {reason}. Choose another one.") from error


def _extract(options: argparse.Namespace, emit: Emit) -> int:
    from subnet_ft.masks import extract
    from subnet_ft.masks.file import check_writable

    check_writable(Path(options.output))
    _check_folder(Path(options.output).parent)
    mask = extract(
        options.base,
        options.tuned,
        criterion=options.criterion,
        tolerance=options.tolerance,
        dtype=options.dtype,
        progress=not options.quiet,
    )
    path = mask.save(options.output)
    _emit_mask(mask, options, emit)
    if not options.json:
        emit(f"  saved in {path}")
    return FINE


def _mask_info(options: argparse.Namespace, emit: Emit) -> int:
    from subnet_ft.masks import SubnetMask

    _emit_mask(SubnetMask.load(options.mask), options, emit)
    return FINE


def _emit_mask(mask: SubnetMask, options: argparse.Namespace, emit: Emit) -> None:
    from subnet_ft.masks.description import mask_figures, mask_lines

    if options.json:
        emit(json.dumps({"version": __version__, **mask_figures(mask)}))
    else:
        emit("\n".join(mask_lines(mask)))


def _evaluate(options: argparse.Namespace, emit: Emit) -> int:
    from subnet_ft.checkpoints import open_checkpoint
    from subnet_ft.evidence.statistics import wilson_interval
    from subnet_ft.tasks import load_recipe_data
    from subnet_ft.verification import answer_prompts

    recipe = _recipe_to_judge(options.recipe, options.overrides)
    folder = open_checkpoint(options.model).folder
    task = load_recipe_data(recipe).evaluation
    if task is None:
        raise RecipeError(str(options.recipe), ["evaluation.enabled: is false, so there are no held-out prompts"])
    records = answer_prompts(folder, recipe, task, progress=not options.quiet)
    correct, total = sum(record["correct"] for record in records), len(records)
    low, high = wilson_interval(correct, total, recipe.evaluation.confidence)
    if options.json:
        figures = {"accuracy": correct / total, "num_prompts": total, "ci_low": low, "ci_high": high}
        emit(json.dumps({"version": __version__, "model": options.model, "task": task.name, **figures}))
    else:
        emit(f"{options.model}: {correct / total:.1%} of {total} prompts ({low:.1%} to {high:.1%})")
    return FINE


def _verify(options: argparse.Namespace, emit: Emit) -> int:
    from subnet_ft.evidence.report import lines_for_terminal, summary_for_cli
    from subnet_ft.verification import has_failed, verify

    if options.output is not None:
        _check_folder(Path(options.output))
    report = verify(
        options.base,
        options.full,
        options.subnet,
        options.mask,
        recipe=_recipe_to_judge(options.recipe) if options.recipe else None,
        output=options.output,
        progress=not options.quiet,
    )
    emit(json.dumps(summary_for_cli(report)) if options.json else "\n".join(lines_for_terminal(report)))
    return VERIFICATION_FAILED if has_failed(report) else FINE


def _recipes(options: argparse.Namespace, emit: Emit) -> int:
    from subnet_ft.recipe import shipped_recipes

    recipes = shipped_recipes()
    if options.json:
        emit(json.dumps({"version": __version__, "recipes": dict(recipes)}))
    else:
        width = max(len(name) for name, _ in recipes)
        emit("\n".join(f"{name:<{width}}  {summary}" for name, summary in recipes))
    return FINE


def _env(options: argparse.Namespace, emit: Emit) -> int:
    from subnet_ft.environment import environment

    found = environment()
    if options.json:
        emit(json.dumps({"version": __version__, **found}))
    else:
        rows = {**{key: value for key, value in found.items() if key != "packages"}, **found["packages"]}
        emit("\n".join(f"{key:<16} {'not found' if value is None else value}" for key, value in rows.items()))
    return FINE


if __name__ == "__main__":
    sys.exit(main())
