"""docs/options.md names keys and values that recipes have, and the errors that it tells of."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from subnet_ft.recipe.schema import Recipe
from subnet_ft.training import ALGORITHMS, config_fields

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "options.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| `") and line.count("|") == 5]
KEYS = sorted({key for key in re.findall(r"`([a-z_]+\.[a-z_.]+)", "\n".join(ROWS)) if "(" not in key})


def annotation(key: str) -> Any:
    """Return the type of a recipe's field by its dotted key."""
    spec: Any = Recipe
    for name in key.split("."):
        if dataclasses.is_dataclass(spec):
            spec = typing.get_type_hints(spec, include_extras=True)[name]
    return spec


def options() -> list[tuple[str, str]]:
    """Return key and value of every option in the first column."""
    found = []
    for row in ROWS:
        first, *others = re.findall(r"`([^`]+)`", row.split("|")[1])
        key, _, value = first.partition(": ")
        found += [(key, word) for word in (value, *others) if word]
    return found


@pytest.mark.parametrize("key", KEYS)
def test_options_page_names_keys_of_recipes(key: str) -> None:
    section, _, name = key.partition(".")
    if section == "training":
        assert any(name in config_fields()[algorithm] for algorithm in ALGORITHMS)
    else:
        annotation(key)


@pytest.mark.parametrize(("key", "value"), options())
def test_options_page_names_values_of_recipes(key: str, value: str) -> None:
    words = typing.get_args(annotation(key)) if not key.startswith("training.") else ()
    literals = [word for part in (words or ()) for word in (typing.get_args(part) or (part,))]
    if any(isinstance(word, str) for word in literals):
        assert value in literals


def test_options_page_has_a_row_for_each_choice_of_quantization_and_optimizer() -> None:
    named = options()
    for key in ("reference.quantization", "subnet.optimizer.name"):
        assert [value for name, value in named if name == key], key
    assert ("reference.quantization", "int8") in named
    assert ("reference.quantization", "nf4") in named
