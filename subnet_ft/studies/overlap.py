"""The study `overlap`: full runs that differ in seed, data or algorithm, and what their masks have in common."""

from __future__ import annotations

from collections.abc import Iterator

from subnet_ft.recipe import Recipe
from subnet_ft.recipe.algorithms import ALGORITHMS, trains_reward_model
from subnet_ft.studies.plan import Cell, Plan, Recipes, need_extracted, own_cell


def plan_overlap(recipes: Recipes) -> Plan:
    """Return the recipe's own full run, and one with another seed, other data, both, another algorithm, and all.

    Other data are those that the recipe draws with another seed, trained on with the recipe's own. Of other algorithms,
    the first recipe beside this one that learns from the same kind of data, and the first that does not. A reward model
    gets no other data: its new head, and so its base, is drawn with the recipe's seed.
    """
    need_extracted(recipes.own, recipes.study)
    own = recipes.own
    other_seed = own.seed + 1
    elsewhere = f"seed={other_seed}"
    cells = [
        own_cell(own),
        Cell(
            name="seed",
            label="another seed",
            group="seed",
            settings=(f"training seed {other_seed}",),
            recipe=own,
            seed=other_seed,
        ),
    ]
    notes: list[str] = []
    if trains_reward_model(own.algorithm):
        notes.append(
            "Other data: a recipe draws them with its seed, and a reward model's new head, too, so that such a run has "
            "another base, whose mask cannot be compared."
        )
    else:
        cells += _other_data(recipes, other_seed)
    chosen = list(_other_algorithms(recipes, notes))
    cells += [
        Cell(
            name=name,
            label=f"another algorithm, {recipe.algorithm}",
            group="algorithm",
            settings=(f"the recipe {name}",),
            recipe=recipe,
        )
        for name, recipe in chosen
    ]
    if chosen:
        name, recipe = chosen[-1]
        cells.append(
            Cell(
                name=f"{name}_seed_and_data",
                label=f"another seed, other data, {recipe.algorithm}",
                group="algorithm",
                settings=(f"the recipe {name}", elsewhere),
                recipe=recipes.sibling(name, f"{name}_seed_and_data", elsewhere),
            )
        )
    else:
        notes.append("Another algorithm: no recipe beside this one has the same base and another algorithm.")
    return Plan(study=recipes.study, recipe=own, cells=cells, notes=notes)


def _other_data(recipes: Recipes, other_seed: int) -> list[Cell]:
    """Return the run on other data alone, and that with another seed, too.

    Args:
        recipes: The study's.
        other_seed: Draws the data.
    """
    elsewhere = f"seed={other_seed}"
    return [
        Cell(
            name="data",
            label="other data",
            group="data",
            settings=(f"data of seed {other_seed}",),
            recipe=recipes.derived("data", elsewhere),
            seed=recipes.own.seed,
        ),
        Cell(
            name="seed_and_data",
            label="another seed, other data",
            group="data",
            settings=(elsewhere,),
            recipe=recipes.derived("seed_and_data", elsewhere),
        ),
    ]


def _other_algorithms(recipes: Recipes, notes: list[str]) -> Iterator[tuple[str, Recipe]]:
    own = ALGORITHMS[recipes.own.algorithm]
    alike = different = None
    for name, sibling in recipes.siblings():
        if isinstance(sibling, str):
            notes.append(f"The recipe `{name}`: {sibling}.")
        elif sibling.algorithm != own.name:
            if ALGORITHMS[sibling.algorithm].learns_from == own.learns_from:
                alike = alike or (name, sibling)
            else:
                different = different or (name, sibling)
    yield from (found for found in (alike, different) if found is not None)
