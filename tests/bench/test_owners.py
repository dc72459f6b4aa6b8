"""Whose a storage is, and that a step of ours makes nothing dense."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import subnet_kernels
from subnet_ft.bench.owners import Owners, persistent_tensors
from subnet_ft.bench.tracker import Peak, StorageTracker
from subnet_ft.checkpoints.tiny import tiny_config
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW

VOCABULARY, HIDDEN, MLP = 3000, 32, 64
MATRIX = HIDDEN * MLP
HEAD = "trainer's head, chunk of the output embedding"


@pytest.fixture
def model() -> Any:
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama")
    config.vocab_size = VOCABULARY
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def masked(model: Any, density: float) -> MaskedAdamW:
    generator = torch.Generator().manual_seed(0)
    mask = SubnetMask.from_dense(
        {name: torch.rand(p.shape, generator=generator) < density for name, p in model.named_parameters()}
    )
    return MaskedAdamW(model.named_parameters(), mask, max_grad_norm=1.0, check_base=False)


def train(model: Any, density: float, num_tokens: int = 7) -> list[Peak]:
    """Take three steps; return the peaks of the first and of the later ones."""
    optimizer = masked(model, density)
    owners = Owners(model)
    tracker = StorageTracker(owners)
    tokens = torch.arange(num_tokens).view(1, -1)
    with tracker:
        for step in range(3):
            if step == 1:
                tracker.mark()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
    owners.check_tokens()
    return tracker.peaks(without=persistent_tensors(optimizer))


def ours(peaks: list[Peak]) -> dict[str, int]:
    return {owner: size for peak in peaks for owner, size in peak.highest.items() if owner.startswith("ours")}


@pytest.mark.parametrize(
    ("allocate", "owner"),
    [
        (lambda: torch.zeros(MATRIX), "one matrix at a time, float32, zeros"),
        (lambda: torch.zeros(1, HIDDEN, MLP), "one matrix at a time, float32, zeros"),
        (lambda: torch.ones(MLP, HIDDEN, dtype=torch.int64), "one matrix at a time, int64, ones"),
        (lambda: torch.zeros(MATRIX, dtype=torch.bool), "one matrix at a time, bool, zeros"),
        (lambda: torch.zeros(MATRIX + 1)[:MATRIX], "one matrix at a time, float32, slice"),
        (lambda: torch.zeros(VOCABULARY * HIDDEN), "tied output embedding, float32, zeros"),
        (lambda: torch.zeros(1025, HIDDEN), f"{HEAD}, float32, zeros"),
        (lambda: torch.zeros(HIDDEN, 2048).bfloat16(), f"{HEAD}, bfloat16, _to_copy"),
    ],
)
def test_owners_go_by_the_number_of_elements(model: Any, allocate: Callable[[], torch.Tensor], owner: str) -> None:
    tracker = StorageTracker(Owners(model))
    with tracker:
        allocate()
    assert owner in tracker.peaks()[0].highest


def test_owners_leave_activations_and_logits_alone(model: Any) -> None:
    tracker = StorageTracker(Owners(model))
    tokens = torch.arange(33).view(3, 11)
    with tracker, torch.no_grad():
        kept = [model(input_ids=tokens).logits, torch.zeros(3, 1100, HIDDEN), torch.zeros(1024, HIDDEN)]
    assert tracker.peaks() == [Peak()]
    assert len(kept) == 3


def test_owners_refuse_a_batch_whose_activations_look_like_a_matrix(model: Any) -> None:
    with pytest.raises(ValueError, match="64 tokens"):
        train(model, 0.2, num_tokens=MLP)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_a_step_of_ours_allocates_nothing_dense(monkeypatch: pytest.MonkeyPatch, model: Any, density: float) -> None:
    monkeypatch.setenv("SUBNET_KERNELS_BACKEND", "cpu")
    count = round(1.1 * density * VOCABULARY * HIDDEN)
    peaks = train(model, density)
    # The first step gathers the weights on the mask, compact, in the weights' dtype, to make the masters.
    assert all(size <= 2 * count for size in ours(peaks[:1]).values())
    assert ours(peaks[1:]) == {}
    assert peaks[0].total > 0


def test_owners_see_a_dense_temporary_of_ours(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    monkeypatch.setenv("SUBNET_KERNELS_BACKEND", "reference")  # which decodes its masks to booleans
    found = ours(train(model, 0.2)[1:])
    assert any(owner.startswith("ours, bool") for owner in found)


@pytest.mark.parametrize("name", ["compact", "masked_adamw"])
def test_owners_see_what_a_hook_or_a_step_of_ours_keeps(monkeypatch: pytest.MonkeyPatch, model: Any, name: str) -> None:
    original, kept = getattr(subnet_kernels, name), []

    def wasteful(*args: Any, **options: Any) -> Any:
        kept.append(torch.full((MATRIX + 5,), 1, dtype=torch.uint8))
        return original(*args, **options)

    monkeypatch.setattr(subnet_kernels, name, wasteful)
    assert ours(train(model, 0.2)[1:])["ours, uint8, full"] == len(kept) * (MATRIX + 5)


def test_a_step_of_ours_allocates_no_dense_numpy_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBNET_KERNELS_BACKEND", "cpu")
    width = 2048

    def peaks() -> list[int]:
        """Return the most bytes that Python and numpy held for a first and a second step."""
        layer = torch.nn.Linear(width, width, bias=False).bfloat16()
        optimizer = masked(layer, 0.2)
        found = []
        tracemalloc.start()
        for _ in range(2):
            layer.weight.grad = torch.ones(width, width).bfloat16()
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            optimizer.step()
            found.append(tracemalloc.get_traced_memory()[1] - before)
        tracemalloc.stop()
        return found

    peaks()  # compiles, or loads what was compiled
    first, later = peaks()
    # The first indexes the mask: about a byte per weight of at most 8,192 tiles at a time.
    assert first < 2 * width**2
    assert later < width**2 / 4

    original = subnet_kernels.masked_adamw

    def wasteful(*args: Any, **options: Any) -> None:
        np.zeros(width**2, dtype=np.bool_)
        original(*args, **options)

    monkeypatch.setattr(subnet_kernels, "masked_adamw", wasteful)
    assert peaks()[1] > width**2
