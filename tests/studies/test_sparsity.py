"""The study of sparsity: the traits of every algorithm, and recipes as they are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from subnet_ft.pipeline import load_checked_recipe
from subnet_ft.studies.plans import plan_study
from subnet_ft.studies.sparsity import traits_of


@pytest.mark.parametrize(
    ("name", "on_policy", "kl"),
    [
        # As in the paper's table: on-policy and KL of each algorithm.
        ("dpo", False, True),
        ("kto", False, True),
        ("orpo", False, False),
        ("simpo", False, False),
        ("prime", True, False),
        ("sft", False, False),
        ("raft", False, False),
    ],
)
def test_traits_are_those_of_the_paper(name: str, on_policy: bool, kl: bool) -> None:
    found = traits_of(load_checked_recipe(f"tiny/{name}"))
    assert (found.on_policy, found.online, found.kl) == (on_policy, on_policy, kl)


@pytest.mark.parametrize(("name", "field"), [("grpo", "beta"), ("ppo", "kl_coef")])
def test_traits_take_kl_from_the_recipe_where_it_has_a_weight(name: str, field: str) -> None:
    assert not traits_of(load_checked_recipe(f"tiny/{name}", [f"training.{field}=0.0"])).kl
    assert traits_of(load_checked_recipe(f"tiny/{name}", [f"training.{field}=0.1"])).kl


def test_plan_sparsity_takes_the_recipes_of_the_folder_as_they_are(tmp_path: Path) -> None:
    plan = plan_study("sparsity", "tiny/grpo", [f"output={tmp_path}"])
    cells = {cell.label: cell for cell in plan.cells}
    assert set(cells) == {"grpo", "dpo", "kto", "orpo", "ppo", "prime", "raft", "rloo", "sft", "simpo"}
    assert cells["orpo"].recipe.training["learning_rate"] == 3e-3
    assert all(cell.versus == (None if label == "grpo" else "as_written") for label, cell in cells.items())
