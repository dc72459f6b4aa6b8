"""Prompts with known answers, rewards that can be verified, and completions sampled from a model."""

from subnet_ft.tasks.generation import generate
from subnet_ft.tasks.load import load_task, prompt_dataset
from subnet_ft.tasks.pairs import sample_pairs
from subnet_ft.tasks.preferences import preference_dataset
from subnet_ft.tasks.recipe_data import RecipeData, load_recipe_data
from subnet_ft.tasks.rewards import reward_functions
from subnet_ft.tasks.task import Example, Task

__all__ = [
    "Example",
    "RecipeData",
    "Task",
    "generate",
    "load_recipe_data",
    "load_task",
    "preference_dataset",
    "prompt_dataset",
    "reward_functions",
    "sample_pairs",
]
