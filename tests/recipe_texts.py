"""Three small recipes, and a way to load them with changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from subnet_ft.errors import RecipeError
from subnet_ft.recipe import Recipe, load_recipe

GRPO = """
model: {name: tiny:llama}
task: {name: reasoning_gym/chain_sum, num_train: 100, num_eval: 10}
algorithm: grpo
training: {learning_rate: 2e-5, max_completion_length: 4}
output: runs/x
"""
DPO = """
model: {name: tiny:llama}
task: {name: reasoning_gym/chain_sum, num_train: 100, num_eval: 10, pairs: {num_prompts: 50, max_new_tokens: 7}}
algorithm: dpo
output: runs/x
"""
REWARD = DPO.replace("dpo", "reward")
PREFERENCES = """
model: {name: tiny:llama}
task: {name: dataset, dataset: {path: some/preferences}, num_train: 100}
algorithm: dpo
evaluation:
  task: {name: dataset, dataset: {path: openai/gsm8k, name: main}, num_eval: 10}
output: runs/x
"""
STEP_BY_STEP = """
model: {name: tiny:llama}
task:
  name: reasoning_gym/chain_sum
  num_train: 100
  num_eval: 10
  rationales: {prompt: 'Explain {question}', num_prompts: 50, answer_pattern: 'so (.)'}
algorithm: distilling_step_by_step
teacher: {name: tiny:qwen3}
output: runs/x
"""


def load_text(folder: Path, text: str, *overrides: str, algorithms: Any = None) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides, algorithms=algorithms)


def problems_of(folder: Path, text: str, *overrides: str, algorithms: Any = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_text(folder, text, *overrides, algorithms=algorithms)
    return caught.value.problems
