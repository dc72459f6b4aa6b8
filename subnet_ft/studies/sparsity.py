"""The study `sparsity`: the recipes of one folder and model, one per algorithm."""

from __future__ import annotations

from subnet_ft.recipe import Recipe
from subnet_ft.recipe.algorithms import ALGORITHMS
from subnet_ft.studies.plan import AS_WRITTEN, Cell, Plan, Recipes, config_default
from subnet_ft.studies.schema import Traits


def plan_sparsity(recipes: Recipes) -> Plan:
    """Return the recipe's own full run and that of every comparable recipe beside it, each with its own settings."""
    found: list[tuple[str, Recipe]] = [(AS_WRITTEN, recipes.own)]
    notes = []
    for name, sibling in recipes.siblings():
        if isinstance(sibling, str):
            notes.append(f"The recipe `{name}`: {sibling}.")
        else:
            found.append((name, sibling))
    algorithms = [recipe.algorithm for _, recipe in found]
    cells = [
        Cell(
            name=name,
            label=recipe.algorithm if algorithms.count(recipe.algorithm) == 1 else f"{recipe.algorithm} ({name})",
            group="algorithm",
            recipe=recipe,
            versus=None if name == AS_WRITTEN else AS_WRITTEN,
        )
        for name, recipe in found
    ]
    return Plan(study=recipes.study, recipe=recipes.own, cells=cells, notes=notes)


def traits_of(recipe: Recipe) -> Traits:
    """Say what kind of algorithm a recipe uses, from the table of algorithms and the recipe's own weights."""
    algorithm = ALGORITHMS[recipe.algorithm]
    samples = algorithm.learns_from == "prompts"
    if algorithm.reference_weight is not None:
        kl = bool(config_default(recipe, algorithm.reference_weight))
    else:
        # A reference model beside preferences or labels is that of an implicit reward under a KL constraint (DPO's
        # derivation, KTO's reference point); beside prompts it only defines a reward.
        kl = bool(algorithm.references) and algorithm.learns_from in ("preferences", "labelled")
    return Traits(on_policy=samples, kl=kl, online=samples, learns_from=algorithm.learns_from)
