"""`PPOConfig`: what it refuses, and that every field says what it is."""

from __future__ import annotations

import ast
import inspect
import itertools
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig

from subnet_ft.training.ppo import PPOConfig, config


def built(tmp_path: Path, **options: Any) -> PPOConfig:
    return PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gamma": 1.5}, r"`gamma` must lie in \[0, 1\], got 1.5"),
        ({"lam": -0.1}, r"`lam` must lie in \[0, 1\], got -0.1"),
        ({"lam": float("nan")}, r"`lam` must lie in"),
        ({"value_learning_rate": -1.0}, r"`value_learning_rate` must be >= 0, got -1.0"),
        ({"kl_coef": -0.1}, r"`kl_coef` must be >= 0"),
        ({"missing_eos_penalty": -1.0}, r"`missing_eos_penalty` must be >= 0"),
        ({"vf_coef": 0.0}, r"`vf_coef` must be > 0, got 0.0; `value_learning_rate: 0` keeps"),
        ({"value_max_grad_norm": 0.0}, r"`value_max_grad_norm` must be > 0, or None for no clipping"),
        ({"cliprange_value": -0.2}, r"`cliprange_value` must be > 0, or None for any distance"),
        ({"value_trains": "half"}, r"`value_trains` must be 'full' or 'subnet', got 'half'"),
        ({"beta": 0.04}, r"`beta` adds a KL term to GRPO's loss and must stay 0, got 0.04; .* set `kl_coef`"),
        ({"loss_type": "sapo"}, r"`loss_type` must be one of dapo, grpo, bnpo, dr_grpo, .* got 'sapo'"),
        ({"importance_sampling_level": "sequence"}, r"`importance_sampling_level` must be 'token'"),
        ({"sync_ref_model": True}, r"`sync_ref_model` must stay false: the reference is the policy as it started"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, r"`multi_objective_aggregation` must stay"),
        ({"fp16": True}, r"`fp16` scales a loss that serves two optimizers"),
        ({"gamma": 2.0, "beta": 1.0}, r"`gamma` must .*; `beta` adds"),
    ],
)
def test_config_refuses(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        built(tmp_path, **options)


def test_config_takes_the_ends_of_every_range(tmp_path: Path) -> None:
    found = built(tmp_path, gamma=0.0, lam=1.0, kl_coef=0.0, cliprange_value=None, value_max_grad_norm=None)
    assert (found.kl_coef, found.cliprange_value, found.value_max_grad_norm) == (0.0, None, None)


def test_config_still_checks_what_grpo_checks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 generations"):
        built(tmp_path, num_generations=1)


def test_config_has_a_string_under_every_field() -> None:
    body = next(node for node in ast.parse(inspect.getsource(config)).body if isinstance(node, ast.ClassDef)).body
    documented = {
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    assert documented == {f.name for f in fields(PPOConfig)} - {f.name for f in fields(GRPOConfig)}
