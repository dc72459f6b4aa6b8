"""The plan of a study by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from subnet_ft.studies.causes import plan_causes
from subnet_ft.studies.masks import plan_early_mask, plan_which_mask
from subnet_ft.studies.overlap import plan_overlap
from subnet_ft.studies.plan import Plan, Recipes
from subnet_ft.studies.sparsity import plan_sparsity

_PLANS: dict[str, Callable[[Recipes], Plan]] = {
    "sparsity": plan_sparsity,
    "overlap": plan_overlap,
    "causes": plan_causes,
    "which_mask": plan_which_mask,
    "early_mask": plan_early_mask,
}

_AMONG_OTHERS = ("sparsity", "overlap")
"""Studies that also run the other recipes of the folder."""


def plan_study(name: str, recipe: str, overrides: Sequence[str] = ()) -> Plan:
    """Return what a study will run, every recipe in it checked.

    Args:
        name: Of the study.
        recipe: A file, or the name of a shipped recipe.
        overrides: `key=value`, for every cell.

    Raises:
        RecipeError: The recipe, or one derived from it, has problems.
        SubnetError: The recipe lacks what the study needs.
    """
    return _PLANS[name](Recipes(recipe, overrides, name, among_others=name in _AMONG_OTHERS))
