"""A recipe's data: held-out prompts are never training prompts, whatever task they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from subnet_ft.errors import TaskError
from subnet_ft.recipe import load_recipe
from subnet_ft.tasks import load_recipe_data
from subnet_ft.tasks.prompts import prompt_key


def one_digit_sums(num_eval: int, num_train: int = 0) -> str:
    """A task of which only 200 different prompts exist."""
    params = "{min_digits: 1, max_digits: 1, min_terms: 2, max_terms: 2}"
    counts = f"num_eval: {num_eval}, num_train: {num_train}"
    return f"{{name: reasoning_gym/chain_sum, params: {params}, prompt: '{{expression}} =', {counts}}}"


def test_load_recipe_data_keeps_an_own_evaluation_task_apart_from_the_training_prompts() -> None:
    overrides = [f"task={one_digit_sums(20, 100)}", f"evaluation.task={one_digit_sums(60)}"]
    data = load_recipe_data(load_recipe("tiny/grpo", overrides))
    assert data.task is not None
    assert data.evaluation is not None
    training = {prompt_key(example.prompt) for example in data.task.train}
    held_out = {prompt_key(example.prompt) for example in data.evaluation.evaluation}
    assert (len(training), len(held_out)) == (100, 60)
    assert not training & held_out


def test_load_recipe_data_says_when_too_few_prompts_are_left() -> None:
    overrides = [f"task={one_digit_sums(20, 150)}", f"evaluation.task={one_digit_sums(60)}"]
    with pytest.raises(TaskError, match="beside the training prompts"):
        load_recipe_data(load_recipe("tiny/grpo", overrides))


def test_load_recipe_data_keeps_preference_prompts_out_of_evaluation(tmp_path: Path) -> None:
    preferences, questions = tmp_path / "preferences.jsonl", tmp_path / "questions.jsonl"
    pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(30)]
    preferences.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rows = [{"prompt": f"q{i}", "answer": "a"} for i in range(20, 60)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(
        "tiny/dpo",
        [
            f"task={{name: dataset, dataset: {{path: {preferences}}}, num_train: 30}}",
            f"evaluation.task={{name: dataset, dataset: {{path: {questions}, eval_split: train}}, num_eval: 30}}",
        ],
    )
    data = load_recipe_data(recipe)
    assert data.task is None
    assert data.evaluation is not None
    assert {example.prompt for example in data.evaluation.evaluation} == {f"q{i}" for i in range(30, 60)}


def test_load_recipe_data_reads_no_held_out_prompts_when_evaluation_is_off() -> None:
    data = load_recipe_data(load_recipe("tiny/grpo", ["evaluation.enabled=false"]))
    assert data.evaluation is None
    assert data.task is not None


def test_load_recipe_data_puts_the_prefix_of_labels_before_held_out_prompts() -> None:
    name, plain = "tiny/distilling_step_by_step", load_recipe_data(load_recipe("tiny/sft")).evaluation
    data = load_recipe_data(load_recipe(name))
    assert data.task is not None
    assert data.evaluation is not None
    assert plain is not None
    assert [one.prompt for one in data.evaluation.evaluation] == [f"[label] {one.prompt}" for one in plain.evaluation]
    assert not any(str(one.prompt).startswith("[") for one in data.task.train)
    other = load_recipe_data(load_recipe(name, [f"evaluation.task={one_digit_sums(5)}"])).evaluation
    assert other is not None
    assert all(str(one.prompt).startswith("[label] ") for one in other.evaluation)
