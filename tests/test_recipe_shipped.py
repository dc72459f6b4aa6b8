from __future__ import annotations

import re
from pathlib import Path

import pytest

from subnet_ft.errors import RecipeError
from subnet_ft.recipe import load_recipe, save_recipe, shipped_recipes

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


FILES = [path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")]
NAMES = sorted(name for name in FILES if not name.startswith("accelerate/"))  # tests/test_launch_files.py


def test_load_recipe_lists_shipped_recipes_when_there_is_no_such_file() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("smollm2_135m/grpo_aritmetic")
    (problem,) = caught.value.problems
    assert caught.value.where == "smollm2_135m/grpo_aritmetic"
    assert "Did you mean `smollm2_135m/grpo_arithmetic`" in problem
    assert "tiny/dpo, tiny/grpo" in problem


def test_shipped_recipes_lists_the_folder() -> None:
    assert [name for name, _ in shipped_recipes()] == NAMES
    assert all(len(summary) > 20 for _, summary in shipped_recipes())


@pytest.mark.parametrize("name", NAMES)
def test_load_recipe_reads_every_shipped_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    assert recipe.model.dtype == "bfloat16"
    save_recipe(recipe, "resolved.yaml")
    assert load_recipe("resolved.yaml") == recipe


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_is_a_document(name: str) -> None:
    head = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("\nmodel:")[0]
    labels = re.findall(r"^# (\w+): ", head, re.MULTILINE)
    assert labels == ["Shows", "Needs", "Launch", "Hardware", "Expected"]
    assert name in re.findall(r"^# Launch: +(.+)$", head, re.MULTILINE)[0].split()


def test_recipes_readme_table_equals_the_folder() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (RECIPES / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| [")
    ]
    assert sorted(row[0] for row in rows) == [f"[{name}]({name}.yaml)" for name in NAMES]
    for row in rows:
        head = (RECIPES / f"{row[0].split(']')[0][1:]}.yaml").read_text(encoding="utf-8")
        launch = re.findall(r"^# Launch: +(.+)$", head, re.MULTILINE)[0]
        assert row[3] == f"`{launch}`"
        assert all(row)
        assert "tests/test_recipe_shipped.py" in row[5]
