"""Recipes to plan in tests."""

from __future__ import annotations

from collections.abc import Sequence

from subnet_ft.plan.build import Load
from subnet_ft.recipe import Recipe, load_recipe
from subnet_ft.training.algorithms import config_fields


def loader(name: str) -> Load:
    """Return what loads a shipped recipe with overrides."""

    def load(overrides: Sequence[str]) -> Recipe:
        return load_recipe(name, overrides, algorithms=config_fields())

    return load


def loaded(name: str, *overrides: str) -> Recipe:
    """Load a shipped recipe."""
    return loader(name)(overrides)
