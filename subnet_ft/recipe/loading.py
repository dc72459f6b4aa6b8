"""Reads recipes from a file or from those shipped with the package, and writes them back."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from subnet_ft.errors import RecipeError
from subnet_ft.recipe.algorithms import ALGORITHMS
from subnet_ft.recipe.parsing import Parser, did_you_mean, show
from subnet_ft.recipe.rules import check_combinations
from subnet_ft.recipe.schema import Recipe
from subnet_ft.recipe.training import check_training
from subnet_ft.recipe.yaml_text import read_yaml, write_yaml

logger = logging.getLogger(__name__)

MachineCheck: TypeAlias = Callable[[Recipe], Iterable[tuple[str, str]]]
"""Recipe to what this machine lacks for it, each a dotted key and the end of a sentence."""

MethodCheck: TypeAlias = Callable[[Recipe, Mapping[str, Any] | None], Iterable[tuple[str, str]]]
"""Recipe and the fields of its algorithm's config to problems with its methods, each as above."""

ConfigCheck: TypeAlias = Callable[[str, Mapping[str, Any]], Iterable[tuple[str, str]]]
"""Algorithm and `training` section to problems, each a dotted key and the end of a sentence."""


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    algorithms: Mapping[str, Mapping[str, Any]] | None = None,
    check_config: ConfigCheck | None = None,
    check_methods: MethodCheck | None = None,
    check_machine: MachineCheck | None = None,
) -> Recipe:
    """Read a recipe, apply `overrides` and check all of it before anything is loaded or trained.

    Args:
        path: A YAML file, or the name of a shipped recipe such as `smollm2_135m/grpo_arithmetic`.
        overrides: `dotted.key=VALUE`, the value in YAML; a later one wins.
        algorithms: For each known algorithm, its config's field names with their type or default. Injected, because
            only the training layer imports TRL; `None` checks no names under `training`.
        check_config: Asks the algorithm's config itself what it refuses, and what this machine lacks for it; called
            when nothing else is wrong with `training`. Injected likewise.
        check_methods: Says what is wrong with `method` and `methods`, whose configs are PEFT's. Injected likewise.
        check_machine: Says what this machine lacks for the rest of the recipe. Injected likewise.

    Raises:
        RecipeError: The file is missing, or the recipe has problems; all of them are listed at once.
    """
    try:
        text = find_recipe(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"cannot be read: {error}"]) from error
    tree, problems = read_yaml(text)
    if tree is None:
        raise RecipeError(str(path), problems or ["the file is empty; see `recipes/README.md` for examples"])
    if not isinstance(tree, dict):
        raise RecipeError(str(path), [*problems, f"must be a map of keys to values, got {show(tree)}"])
    for override in overrides:
        problems.extend(_apply_override(tree, override))
    recipe, found = _parse(tree, algorithms, check_config, check_methods, check_machine)
    if problems or found:
        raise RecipeError(str(path), problems + found)
    if recipe.model.dtype == "float32" and recipe.subnet.source.criterion == "exact":
        logger.warning(
            "Recipe `%s`: with `model.dtype: float32` nearly every weight changes, so an exact mask is nearly dense. "
            "Use bfloat16, or `criterion: absolute` with a tolerance.",
            path,
        )
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain dicts, lists and scalars, every default spelled out."""
    return dataclasses.asdict(recipe)


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe as YAML; `load_recipe` reads the same recipe back."""
    Path(path).write_text(write_yaml(recipe_to_dict(recipe)), encoding="utf-8")


def shipped_recipes() -> list[tuple[str, str]]:
    """Return name and first comment paragraph of every recipe that comes with the package, sorted by name."""
    folder = recipes_folder()
    found = sorted(folder.rglob("*.yaml")) if folder.is_dir() else []
    paths = [path for path in found if path.relative_to(folder).parts[0] != LAUNCHES]
    return [
        (path.relative_to(folder).with_suffix("").as_posix(), _first_paragraph(path.read_text(encoding="utf-8")))
        for path in paths
    ]


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: package data, or `recipes/` beside the package in a source tree."""
    package = Path(str(files("subnet_ft")))
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def find_recipe(path: str | Path) -> Path:
    """Return the file of a recipe given by path or by shipped name.

    Raises:
        RecipeError: Neither exists; the message lists the shipped recipes.
    """
    if Path(path).is_file():
        return Path(path)
    name = str(path).removesuffix(".yaml")
    names = [shipped for shipped, _ in shipped_recipes()]
    if name in names:
        return recipes_folder() / f"{name}.yaml"
    last = name.rsplit("/", 1)[-1]
    close = difflib.get_close_matches(name, names, n=2) or [known for known in names if known.endswith(f"/{last}")]
    hint = f" Did you mean {' or '.join(f'`{known}`' for known in close)}?" if close else ""
    raise RecipeError(
        str(path), [f"no such file, and no shipped recipe has this name.{hint} Shipped: {', '.join(names) or 'none'}."]
    )


LAUNCHES = "accelerate"
"""Folder beside the recipes that holds files for `accelerate launch --config_file`."""

_READ_BY_MACHINE_CHECK = ("model", "methods", "reference", "subnet.optimizer", "teacher", "training")


def _parse(
    tree: dict[str, Any],
    algorithms: Mapping[str, Mapping[str, Any]] | None,
    check_config: ConfigCheck | None,
    check_methods: MethodCheck | None,
    check_machine: MachineCheck | None,
) -> tuple[Recipe, list[str]]:
    parser = Parser()
    recipe: Recipe = parser.parse(Recipe, tree)
    known: Collection[str] = algorithms if algorithms is not None else ALGORITHMS
    if parser.is_usable("algorithm") and recipe.algorithm not in known:
        parser.report("algorithm", f"unknown, got {show(recipe.algorithm)}{did_you_mean(recipe.algorithm, known)}")
    fields = algorithms.get(recipe.algorithm) if algorithms is not None and parser.is_usable("algorithm") else None
    if parser.is_usable("training"):
        check_training(parser, recipe.training, recipe.algorithm, fields)
    if check_config is not None and parser.is_usable("algorithm", "training"):
        for key, message in check_config(recipe.algorithm, recipe.training):
            parser.report(key, message)
    if check_methods is not None and parser.has("method") and parser.has("methods"):
        for key, message in check_methods(recipe, fields):
            parser.report(key, message)
    check_combinations(parser, recipe)
    if check_machine is not None and all(parser.has(section) for section in _READ_BY_MACHINE_CHECK):
        for key, message in check_machine(recipe):
            if parser.is_usable(key):
                parser.report(key, message)
    if not parser.problems and "max_new_tokens" not in (tree.get("evaluation") or {}):
        evaluation = dataclasses.replace(recipe.evaluation, max_new_tokens=_longest_answer(recipe))
        recipe = dataclasses.replace(recipe, evaluation=evaluation)
    return recipe, parser.problems


def _longest_answer(recipe: Recipe) -> int:
    if "max_completion_length" in recipe.training:
        return int(recipe.training["max_completion_length"])
    return recipe.task.pairs.max_new_tokens if recipe.task.pairs else recipe.evaluation.max_new_tokens


def _apply_override(tree: dict[str, Any], override: str) -> list[str]:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        return [f"override `{override}`: must be `key=value`, such as `training.learning_rate=1e-6`"]
    value, problems = read_yaml(text)
    if problems:
        return [f"override `{override}`: {problem}" for problem in problems]
    section = tree
    for depth, name in enumerate(names[:-1], start=1):
        if section.get(name) is None:
            section[name] = {}
        if not isinstance(section[name], dict):
            return [
                f"override `{override}`: `{'.'.join(names[:depth])}` is {show(section[name])}, which has no keys; "
                "set it as a whole"
            ]
        # A copy, because a YAML alias may share the section with another key.
        section[name] = dict(section[name])
        section = section[name]
    section[names[-1]] = value
    return []


def _first_paragraph(text: str) -> str:
    lines: list[str] = []
    for line in text.splitlines():
        content = line.lstrip("#").strip() if line.startswith("#") else ""
        if not content:
            if lines:
                break
            continue
        lines.append(content)
    return " ".join(lines)
