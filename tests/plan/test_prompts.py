from __future__ import annotations

from plan.recipes import loaded

from subnet_ft.checkpoints.tiny import tiny_tokenizer
from subnet_ft.plan.prompts import LOOKED_AT, longest_prompt
from subnet_ft.tasks import load_task


def test_longest_prompt_is_that_of_the_first_training_prompts() -> None:
    recipe = loaded("tiny/grpo")
    task, tokenizer = load_task(recipe.task, seed=recipe.seed), tiny_tokenizer()
    assert len(task.train) <= LOOKED_AT
    expected = [len(tokenizer(str(example.prompt))["input_ids"]) for example in task.train]
    assert longest_prompt(recipe) == max(expected) > min(expected)
    longer = longest_prompt(recipe, with_answer=True)
    assert longer is not None
    assert longer >= max(expected) + 2


def test_longest_prompt_does_not_ask_the_hub() -> None:
    assert longest_prompt(loaded("tiny/grpo", "model.name=owner/model")) is None
    assert longest_prompt(loaded("paper/tulu3_8b_dpo")) is None
