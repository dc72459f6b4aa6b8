"""`PRIMEConfig`: the paper's defaults but one, every field documented, and what it refuses."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig

from subnet_ft.training.prime import PRIMEConfig, config

OTHER_LOSSES = ("vespo", "luspo", "cispo", "sapo")
"""Of GRPO: they weigh a completion as one, or clip otherwise than PPO."""
COMMON = {"report_to": "none", "use_cpu": True, "bf16": False}


def built(folder: Path, **options: Any) -> PRIMEConfig:
    return PRIMEConfig(output_dir=str(folder), **COMMON, **options)


def own_fields() -> list[str]:
    return [field.name for field in fields(PRIMEConfig) if field.name not in {old.name for old in fields(GRPOConfig)}]


def test_config_has_the_papers_numbers_except_prm_update(tmp_path: Path) -> None:
    """Algorithm 1 learns from a batch `after` it scored it; verl, the paper's code, `before`."""
    found = built(tmp_path)
    assert "except `prm_update`" in str(PRIMEConfig.__doc__)
    assert {name: getattr(found, name) for name in own_fields()} == {
        "prm_learning_rate": 1e-6,
        "prm_beta": 0.05,
        "prm_weight_decay": 0.0,
        "prm_trains": "full",
        "prm_max_grad_norm": 1.0,
        "prm_update": "before",
        "outcome_coef": 1.0,
        "process_coef": 1.0,
        "gamma": 1.0,
        "accuracy_low": 0.2,
        "accuracy_high": 0.8,
    }
    assert found.beta == 0


def test_config_says_of_every_field_what_it_is() -> None:
    (body,) = (node.body for node in ast.parse(inspect.getsource(config)).body if isinstance(node, ast.ClassDef))
    documented = {
        field.target.id
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    assert documented == set(own_fields())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prm_learning_rate": -1e-6}, "`prm_learning_rate` must be a number >= 0, got -1e-06"),
        ({"prm_learning_rate": float("nan")}, "`prm_learning_rate` must be a number >= 0, got nan"),
        ({"prm_weight_decay": float("inf")}, "`prm_weight_decay` must be a number >= 0, got inf"),
        ({"prm_beta": 0}, "`prm_beta` must be a number > 0, got 0"),
        ({"prm_max_grad_norm": 0.0}, r"`prm_max_grad_norm` must be > 0, got 0\.0; `inf`"),
        ({"outcome_coef": -1}, "`outcome_coef` must be a number >= 0, got -1"),
        ({"process_coef": -0.5}, r"`process_coef` must be a number >= 0, got -0\.5"),
        ({"gamma": 1.5}, r"`gamma` must lie in \[0, 1\], got 1\.5"),
        ({"prm_trains": "half"}, "`prm_trains` must be 'full' or 'subnet', got 'half'"),
        ({"prm_update": "never"}, "`prm_update` must be 'before' or 'after', got 'never'"),
        ({"accuracy_low": 0.9}, r"0 <= low <= high <= 1, got 0\.9 and 0\.8.*0 and 1 filter no prompt"),
        ({"accuracy_high": 1.1}, r"0 <= low <= high <= 1, got 0\.2 and 1\.1"),
        ({"outcome_coef": 0, "process_coef": 0}, "both 0.*set one of them"),
        ({"beta": 0.04}, r"`beta` must stay 0, got 0\.04.*`prm_beta`"),
        *(({"loss_type": name}, f"`loss_type` must be one of dapo, .* got '{name}'") for name in OTHER_LOSSES),
        ({"importance_sampling_level": "sequence"}, r"`importance_sampling_level` must be 'token', .* got 'sequence'"),
        ({"sync_ref_model": True}, r"`sync_ref_model` must stay false: the reference is the policy as it started"),
        ({"fp16": True}, "`fp16`.*bfloat16"),
        ({"gamma": -1, "prm_beta": -1}, r"`prm_beta` .*got -1; .*; `gamma` .*got -1"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "'normalize_then_sum'.*`reward_weights`"),
    ],
    ids=str,
)
def test_config_refuses(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(tmp_path, **options)
