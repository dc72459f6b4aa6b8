"""The study of causes: one thing changed in every cell; rate and steps are equal wherever they are no cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study_runs import plan_of

from subnet_ft.recipe import recipe_to_dict
from subnet_ft.studies.causes import REWORDED
from subnet_ft.studies.plan import Plan
from subnet_ft.studies.plans import plan_study

MAY_DIFFER = {
    "kl_on": {"training.beta"},
    "clipping_off": {"training.max_grad_norm"},
    "steps_quarter": {"training.max_steps", "training.save_steps"},
    "steps_double": {"training.max_steps"},
    "rate_triple": {"training.learning_rate"},
    "no_masters": {"subnet.optimizer.master"},
    "sgd_1000x": {"subnet.optimizer.name", "training.learning_rate"},
    "float32": {"model.dtype"},
    "seed": set(),
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_of("causes", tmp_path_factory.mktemp("causes"))


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("name", MAY_DIFFER)
def test_plan_causes_changes_one_thing(name: str, plan: Plan) -> None:
    cell = next(cell for cell in plan.cells if cell.name == name)
    own, other = leaves(recipe_to_dict(plan.recipe)), leaves(recipe_to_dict(cell.recipe))
    changed = {key for key in {*own, *other} if own.get(key) != other.get(key)} - {"output"}
    assert changed == MAY_DIFFER[name]
    assert cell.seed == (1 if name == "seed" else None)


def test_plan_causes_copies_data_near_and_far_at_one_rate(plan: Plan) -> None:
    near, reference, far = (cell for cell in plan.cells if cell.group == "data")
    assert [cell.recipe.algorithm for cell in (near, reference, far)] == ["raft", "sft", "sft"]
    assert (reference.versus, far.versus) == (near.name, near.name)
    assert near.recipe.training == reference.recipe.training == far.recipe.training
    assert near.recipe.training["learning_rate"] == plan.recipe.training["learning_rate"]
    # The tiny recipe's prompt ends with a space, so its answer needs none.
    assert (reference.recipe.task.completion, far.recipe.task.completion) == ("{completion}", REWORDED)
    assert all(cell.measure_data for cell in (near, reference, far))


def test_plan_causes_goes_the_other_way_from_a_recipe_that_has_the_cause(tmp_path: Path) -> None:
    changes = ["training.beta=0.1", "training.max_grad_norm=0.0", "subnet.optimizer.name=sgd"]
    names = [cell.name for cell in plan_of("causes", tmp_path, *changes, "subnet.optimizer.master=none").cells]
    assert {"kl_off", "clipping_on", "adamw", "masters"} <= set(names)
    assert not {"kl_on", "clipping_off", "sgd_1x", "no_masters"} & set(names)


def test_plan_causes_says_what_it_cannot_vary(tmp_path: Path) -> None:
    changes = ["task.pairs.num_prompts=100", "training.max_steps=3", "training.save_steps=3"]
    plan = plan_of("causes", tmp_path, *changes, recipe="tiny/dpo")
    notes = "\n".join(plan.notes)
    assert "`dpo` has no weight that switches it on or off" in notes
    assert "`training.max_steps` of at least 4" in notes
    assert not any(cell.group in ("KL", "steps") for cell in plan.cells)


def test_plan_causes_compares_precision_on_a_tiny_model_where_float32_would_be_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = plan_of("causes", tmp_path, "subnet.source.tolerance=0.0", recipe="smollm2_135m/grpo_arithmetic")
    small = [cell for cell in plan.cells if cell.group == "precision"]
    assert [(cell.recipe.model.name, cell.recipe.model.dtype) for cell in small] == [
        ("tiny:llama", "bfloat16"), ("tiny:llama", "bfloat16"), ("tiny:llama", "float32"),
    ]  # fmt: skip
    assert [cell.versus for cell in small] == [None, "tiny_bfloat16", "tiny_bfloat16"]
    # They run as shipped: settings of the large model would be none for the tiny one.
    assert small[0].recipe.training["max_steps"] == 25
    assert "without a GPU it is slow" in "\n".join(plan.notes)
    copied = {cell.name: cell.recipe.task for cell in plan.cells if cell.group == "data"}
    assert copied["data_reference"].completion == " {completion}"
    pairs = copied["data_own_samples"].pairs
    assert pairs is not None
    # Eight steps of 32 rows, two prompts for each of them; but only 120 are there.
    assert pairs.num_prompts == 120
    more = plan_of(
        "causes", tmp_path, "subnet.source.tolerance=0.0", "task.num_train=4000", recipe="smollm2_135m/grpo_arithmetic"
    )
    pairs = next(cell for cell in more.cells if cell.name == "data_own_samples").recipe.task.pairs
    assert pairs is not None
    assert pairs.num_prompts == 512


def test_plan_causes_of_a_reward_model_puts_no_answers_beside_pairs(tmp_path: Path) -> None:
    plan = plan_study("causes", "tiny/reward", [f"output={tmp_path}"])
    assert {cell.recipe.algorithm for cell in plan.cells} == {"reward"}
    assert any(note.startswith("Data near to and far from the policy: a reward model") for note in plan.notes)


@pytest.mark.parametrize("recipe", ["tiny/distillation", "tiny/distilling_step_by_step"])
def test_plan_causes_copies_data_without_the_teacher_of_the_recipe(recipe: str, tmp_path: Path) -> None:
    plan = plan_study("causes", recipe, [f"output={tmp_path}"])
    copied = [cell.recipe for cell in plan.cells if cell.group == "data"]
    assert [found.algorithm for found in copied] == ["raft", "sft", "sft"]
    assert all(found.teacher is None and found.task.rationales is None for found in copied)
    assert plan.recipe.teacher is not None
