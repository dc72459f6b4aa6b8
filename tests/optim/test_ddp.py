"""MaskedAdamW under DDP with two gloo processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import torchrun
from odd_model import OddModel, odd_mask

from subnet_ft.errors import GradientError
from subnet_ft.optim import MaskedSGD, prepare_ddp

COMPACT = (
    "compact",
    "compact, a tensor leaves and comes back",
    "compact, micro-batches",
    "compact, NaN in one process",
)
WAYS = (
    *COMPACT,
    "as it comes",
    "a tensor leaves and comes back",
    "masked norm",
    "full norm",
    "full norm, a frozen tensor",
    "micro-batches",
    "NaN in one process",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What either process wrote."""
    folder = tmp_path_factory.mktemp("ddp")
    torchrun(Path(__file__).with_name("ddp_worker.py"), folder, processes=2)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in (0, 1)]


def test_check_replicas_names_what_differs_and_prepare_ddp_makes_it_one(runs: Any) -> None:
    for rank in range(2):
        said = runs.result(2, rank)["refusals"]["replicas"]
        assert "parted ways: `block.weight`" in said
        assert f"in process {rank} or elsewhere" in said


@pytest.mark.parametrize("way", WAYS)
def test_both_processes_have_the_same_bits_after_every_step(ranks: list[dict[str, Any]], way: str) -> None:
    digests, other = (rank["ways"][way]["digests"] for rank in ranks)
    assert digests == other
    assert len(digests) == 5
    assert len(set(digests)) == (4 if "NaN" in way else 5)
    for rank in ranks:
        assert rank["ways"][way]["off_mask"] == 0
        assert rank["ways"][way]["moved"] > 0.5 * rank["ways"][way]["trainable"]


@pytest.mark.parametrize("way", [way for way in WAYS if "NaN" not in way])
def test_masked_adamw_under_ddp_equals_one_process_on_all_data(ranks: list[dict[str, Any]], way: str) -> None:
    for rank in ranks:
        # Averaging two gradients rounds otherwise than one gradient of both batches; a process that trained on its own
        # data only ends far away.
        assert rank["ways"][way]["to_all_data"] < 1e-5
        assert rank["ways"][way]["to_own_data"] > 1e-3


def test_the_full_norm_clips_more_than_the_masked_one(ranks: list[dict[str, Any]]) -> None:
    """Or the test of the full norm would show nothing."""
    for rank in ranks:
        assert rank["ways"]["full norm"]["digests"][0] != rank["ways"]["masked norm"]["digests"][0]


@pytest.mark.parametrize("prefix", ["", "compact, "])
def test_a_tensor_that_leaves_under_ddp_stands_still_until_it_comes_back(
    ranks: list[dict[str, Any]], prefix: str
) -> None:
    for rank in ranks:
        first, second, third, fourth, fifth = rank["ways"][f"{prefix}a tensor leaves and comes back"]["digests_of_one"]
        assert first == second == third
        assert len({third, fourth, fifth}) == 3


@pytest.mark.parametrize("prefix", ["", "compact, "])
def test_nan_in_one_process_leaves_the_step_out_in_both(ranks: list[dict[str, Any]], prefix: str) -> None:
    for rank in ranks:
        found, usual = rank["ways"][f"{prefix}NaN in one process"], rank["ways"]["compact" if prefix else "as it comes"]
        assert found["skipped"] == 1
        assert found["digests"][2] == found["digests"][1]
        assert found["digests"][:2] == usual["digests"][:2]
        assert found["digests"][3:] != usual["digests"][3:]


def test_prepare_ddp_keeps_a_norm_and_tells_ddp_every_spelling_of_the_rest() -> None:
    model = OddModel()
    model.scale = torch.nn.Parameter(torch.ones(2, 2))
    assert prepare_ddp(model) == "norm.weight"
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert "norm.weight" not in ignored
    assert {"embedding.weight", "head.weight", ".scale", "scale", "_orig_mod.narrow.bias"} <= ignored
    assert prepare_ddp(model, kept="wide.bias") == "wide.bias"
    with pytest.raises(GradientError, match="no parameter `other` for DDP to keep"):
        prepare_ddp(model, kept="other")


def test_prepare_ddp_in_one_process_changes_no_bit() -> None:
    models = [OddModel(), OddModel()]
    prepare_ddp(models[0])
    for model in models:
        optimizer = MaskedSGD(model.named_parameters(), odd_mask(), lr=0.1, max_grad_norm=0.1)
        for step in range(2):
            model(torch.full((2, 4), step)).backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert models[0].norm.weight.requires_grad


def test_prepare_ddp_trains_the_kept_tensor_only_as_the_mask_says() -> None:
    mask = odd_mask()
    model = OddModel()
    kept = "block.bias"  # nothing of it is trained
    prepare_ddp(model, kept=kept)
    optimizer = MaskedSGD(model.named_parameters(), mask, lr=0.1, max_grad_norm=None)
    assert model.block.bias.requires_grad, "DDP insists on its gradient"
    model(torch.ones(2, 4, dtype=torch.int64)).backward()
    assert model.block.bias.grad is not None
    optimizer.step()
    assert torch.equal(model.block.bias, OddModel().block.bias)
    assert not torch.equal(model.wide.weight, OddModel().wide.weight)
