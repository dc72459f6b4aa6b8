"""Plans: every recipe checked beforehand, overrides where they have a meaning, folders of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from study_runs import SHORT, plan_of

from subnet_ft.errors import RecipeError, SubnetError
from subnet_ft.recipe.loading import recipes_folder
from subnet_ft.studies.plan import Recipes, config_default
from subnet_ft.studies.plans import plan_study


def test_recipes_derived_are_validated(tmp_path: Path) -> None:
    recipes = Recipes("tiny/grpo", [*SHORT, f"output={tmp_path}"], "causes")
    with pytest.raises(RecipeError, match=r"training\.beta"):
        recipes.derived("kl", "training.beta=high")


def test_recipes_derived_keep_overrides_and_have_their_own_folder(tmp_path: Path) -> None:
    recipes = Recipes("tiny/grpo", [*SHORT, f"output={tmp_path}"], "causes")
    derived = recipes.derived("kl", "training.beta=0.1")
    assert (derived.training["beta"], derived.training["max_steps"]) == (0.1, 8)
    assert Path(derived.output) == tmp_path / "studies" / "causes" / "kl"


def test_with_algorithm_keeps_the_trainer_settings_and_drops_those_of_the_other_algorithm(tmp_path: Path) -> None:
    recipes = Recipes("tiny/grpo", [*SHORT, f"output={tmp_path}"], "causes")
    sft = recipes.with_algorithm("sft", "data", "task.pairs=null")
    assert sft.algorithm == "sft"
    for name in ("learning_rate", "max_steps", "per_device_train_batch_size", "activation_checkpointing"):
        assert sft.training[name] == recipes.own.training[name]
    assert not {"num_generations", "temperature", "beta", "max_completion_length"} & set(sft.training)
    # Answers are as long as the recipe's, which takes their length from its training section.
    assert sft.evaluation.max_new_tokens == recipes.own.evaluation.max_new_tokens == 2


def test_recipes_repeat_only_what_the_study_repeats(tmp_path: Path) -> None:
    recipes = Recipes("tiny/grpo", [f"output={tmp_path}", "repeats.seeds=[1, 2]", "repeats.runs=all"], "causes")
    assert recipes.own.repeats.seeds == recipes.derived("x").repeats.seeds == []
    assert recipes.own.repeats.runs == "full"


def folder_of(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name in names:
        shutil.copyfile(recipes_folder() / "tiny" / f"{name}.yaml", folder / f"{name}.yaml")
    return folder


def test_siblings_get_the_overrides_that_mean_something_to_them(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "grpo", "dpo", "sft")
    overrides = ["training.max_steps=3", "training.num_generations=8", "task.pairs.num_prompts=50"]
    plan = plan_study("sparsity", str(folder / "grpo.yaml"), [*overrides, f"output={tmp_path / 'run'}"])
    own, dpo, sft = (cell.recipe for cell in plan.cells)
    assert {recipe.training["max_steps"] for recipe in (own, dpo, sft)} == {3}
    assert own.training["num_generations"] == 8
    assert "num_generations" not in dpo.training
    assert dpo.task.pairs is not None
    assert dpo.task.pairs.num_prompts == 50
    assert own.task.pairs is sft.task.pairs is None


def test_an_override_without_meaning_anywhere_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "grpo", "sft")
    with pytest.raises(RecipeError, match=r"training\.num_generation: unknown key; did you mean"):
        plan_study("sparsity", str(folder / "grpo.yaml"), ["training.num_generation=8", f"output={tmp_path / 'run'}"])


def test_siblings_that_cannot_be_compared_are_named_with_the_reason(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "grpo", "sft", "reward", "distillation", "rloo")
    (folder / "broken.yaml").write_text("algorithm: grpo\n")
    text = (folder / "rloo.yaml").read_text().replace("tiny:llama", "tiny:qwen3")
    (folder / "rloo.yaml").write_text(text)
    plan = plan_study("sparsity", str(folder / "grpo.yaml"), [f"output={tmp_path / 'run'}"])
    assert [cell.name for cell in plan.cells] == ["as_written", "sft"]
    notes = "\n".join(plan.notes)
    for part in (
        "`reward`: one of the two trains a reward model",
        "`distillation`: its teacher `runs/tiny_sft/full` is not there",
        "`rloo`: its base is tiny:qwen3",
        "`broken`: it cannot run here: model: missing",
    ):
        assert part in notes


def test_only_keeps_what_a_cell_is_compared_with_and_says_what_is_left_out(tmp_path: Path) -> None:
    plan = plan_of("causes", tmp_path, only=["kl_on"])
    assert [cell.name for cell in plan.cells] == ["as_written", "kl_on"]
    assert "data_reference" in plan.notes[-1]
    data = plan_of("causes", tmp_path, only=["data_reference"])
    assert [cell.name for cell in data.cells] == ["as_written", "data_own_samples", "data_reference"]


def test_only_refuses_an_unknown_cell(tmp_path: Path) -> None:
    with pytest.raises(SubnetError, match="`kl_off` is no cell of the study `causes`; did you mean `kl_on`"):
        plan_of("causes", tmp_path, only=["kl_off"])


def test_config_default_is_the_recipe_else_the_config(tmp_path: Path) -> None:
    recipes = Recipes("tiny/grpo", [f"output={tmp_path}", "training.beta=0.5"], "causes")
    assert config_default(recipes.own, "beta") == 0.5
    assert config_default(recipes.own, "max_grad_norm") == 1.0
