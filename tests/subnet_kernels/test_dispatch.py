"""The dispatch point names what runs."""

from __future__ import annotations

import pytest
import torch

import subnet_kernels


def test_choose_says_which_backend_and_why() -> None:
    choice = subnet_kernels.choose("gather", torch.device("cpu"))
    assert choice.backend == "reference"
    assert "cpu" in choice.reason


def test_backends_cover_every_op() -> None:
    ops = set(subnet_kernels.__all__) - {"CRITERIA", "backends", "bits_view", "choose", "round_to_bfloat16"}
    assert set(subnet_kernels.backends(torch.device("cpu"))) == ops


def test_choose_refuses_an_unknown_op() -> None:
    with pytest.raises(KeyError, match="is not an op"):
        subnet_kernels.choose("gahter", torch.device("cpu"))
