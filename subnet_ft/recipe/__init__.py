"""Recipes: one YAML file that says everything about an experiment, parsed into frozen dataclasses."""

from __future__ import annotations

from subnet_ft.recipe.evidence_schema import EvidenceSpec, RepeatsSpec, RetentionSpec
from subnet_ft.recipe.loading import load_recipe, recipe_to_dict, save_recipe, shipped_recipes
from subnet_ft.recipe.mask_schema import Control, Criterion, SourceSpec
from subnet_ft.recipe.schema import (
    Dtype,
    EvaluationSpec,
    MethodSpec,
    ModelSpec,
    OptimizerSpec,
    Recipe,
    SubnetSpec,
)
from subnet_ft.recipe.task_schema import DatasetSpec, PairsSpec, RationalesSpec, TaskSpec

__all__ = [
    "Control",
    "Criterion",
    "DatasetSpec",
    "Dtype",
    "EvaluationSpec",
    "EvidenceSpec",
    "MethodSpec",
    "ModelSpec",
    "OptimizerSpec",
    "PairsSpec",
    "RationalesSpec",
    "Recipe",
    "RepeatsSpec",
    "RetentionSpec",
    "SourceSpec",
    "SubnetSpec",
    "TaskSpec",
    "load_recipe",
    "recipe_to_dict",
    "save_recipe",
    "shipped_recipes",
]
