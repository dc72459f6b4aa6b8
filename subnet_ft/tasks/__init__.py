"""Prompts with known answers, rewards that can be verified, and completions sampled from a model."""

from subnet_ft.tasks.demonstrations import demonstration_dataset
from subnet_ft.tasks.generation import generate
from subnet_ft.tasks.load import load_task, prompt_dataset
from subnet_ft.tasks.preferences import labelled_dataset, preference_dataset
from subnet_ft.tasks.rationales import rationale_dataset, teacher_prompts, write_rationales
from subnet_ft.tasks.recipe_data import RecipeData, load_recipe_data
from subnet_ft.tasks.rewards import reward_functions
from subnet_ft.tasks.samples import SampledPrompt, dataset_of_samples, preference_pairs, sample_completions
from subnet_ft.tasks.task import Example, Task

__all__ = [
    "Example",
    "RecipeData",
    "SampledPrompt",
    "Task",
    "dataset_of_samples",
    "demonstration_dataset",
    "generate",
    "labelled_dataset",
    "load_recipe_data",
    "load_task",
    "preference_dataset",
    "preference_pairs",
    "prompt_dataset",
    "rationale_dataset",
    "reward_functions",
    "sample_completions",
    "teacher_prompts",
    "write_rationales",
]
