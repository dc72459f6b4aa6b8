"""Compact gradients under DDP where a tensor gets several in one backward pass: checkpoints, a layer used twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import torchrun
from safetensors.torch import load_file

WAYS = ("plain", "re-entrant", "newer")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes left gradients and weights."""
    folder = tmp_path_factory.mktemp("reentrant")
    torchrun(Path(__file__).with_name("reentrant_worker.py"), folder, processes=2)
    return folder


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_used_twice_gets_the_gradient_of_one_process_on_all_data(
    ranks: Path, way: str, micro_batches: int
) -> None:
    expected = load_file(ranks / "alone-0.safetensors")
    for rank in (0, 1):
        found = load_file(ranks / f"{way}-{micro_batches}-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_reentrant_kind_gives_two_gradients_in_one_backward_pass(ranks: Path) -> None:
    """Or the test above would show nothing of it."""
    for rank in (0, 1):
        arrivals = json.loads((ranks / f"arrivals-{rank}.json").read_text())
        assert arrivals["plain-1"] == arrivals["newer-1"] == 3
        assert arrivals["re-entrant-1"] == 6
        assert arrivals["re-entrant-2"] == 12
