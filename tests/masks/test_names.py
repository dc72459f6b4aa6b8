"""Canonical names: wrappers go, nothing collapses silently."""

from __future__ import annotations

import pytest
import torch

from subnet_ft.errors import MaskError
from subnet_ft.masks import SubnetMask, by_canonical_name, canonical_name


def test_canonical_name_strips_wrappers_only() -> None:
    assert canonical_name("module._orig_mod.model.norm.weight") == "model.norm.weight"
    assert canonical_name("_fsdp_wrapped_module.a.module.b") == "a.b"
    assert canonical_name("layers.0._checkpoint_wrapped_module.mlp.weight") == "layers.0.mlp.weight"
    assert canonical_name("model.modules_to_save.w") == "model.modules_to_save.w"


def test_by_canonical_name_keeps_order_and_values() -> None:
    assert list(by_canonical_name([("module.b", 1), ("module.a", 2)]).items()) == [("b", 1), ("a", 2)]


def test_by_canonical_name_refuses_two_names_that_become_one() -> None:
    with pytest.raises(MaskError, match=r"`block\.w` and `block\.module\.w` both become `block\.w`"):
        by_canonical_name([("block.w", 1), ("block.module.w", 2)])


def test_subnet_mask_from_dense_refuses_two_names_that_become_one() -> None:
    dense = {"w": torch.zeros(2, dtype=torch.bool), "module.w": torch.ones(2, dtype=torch.bool)}
    with pytest.raises(MaskError, match=r"`w` and `module\.w` both become `w`"):
        SubnetMask.from_dense(dense)


def test_subnet_mask_check_refuses_a_model_with_two_names_that_become_one() -> None:
    model = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2), "_orig_mod": torch.nn.Linear(2, 2)})
    with pytest.raises(MaskError, match=r"`module\.weight` and `_orig_mod\.weight` both become `weight`"):
        SubnetMask.full({"weight": (2, 2), "bias": (2,)}).check(model)
