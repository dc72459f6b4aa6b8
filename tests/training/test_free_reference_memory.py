"""What a free reference saves at the peak of DPO, counted tensor by tensor: the same in every run, on every machine."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_mask
from training.free_reference_runs import trainer_with_reference
from transformers import TrainerCallback

from subnet_ft.bench.tracker import StorageTracker
from subnet_ft.training import restrict


def living() -> dict[int, int]:
    """Return the bytes of every storage that a tensor of this process holds, by its address."""
    gc.collect()
    tensors = [held for held in gc.get_objects() if issubclass(type(held), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
    return {storage._cdata: storage.nbytes() for storage in storages}


def peak_of(folder: Path, *, density: float, free: bool) -> tuple[int, int, list[Any]]:
    """Train with DPO; return the most bytes that were held at a time, those of a second model, and the losses."""
    before = living()
    trainer = trainer_with_reference("DPO", folder, max_steps=3, activation_checkpointing=False)
    second = sum(parameter.nbytes for parameter in trainer.ref_model.parameters())
    tracker = StorageTracker(lambda op, tensor: "any")
    held: dict[int, int] = {}

    class Count(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            held.update({address: size for address, size in living().items() if address not in before})
            tracker.__enter__()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tracker.__exit__(None, None, None)

    restrict(trainer, random_mask(trainer.model, density), free_reference=free)
    trainer.add_callback(Count())
    trainer.train()
    (peak,) = tracker.peaks()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return sum(held.values()) + peak.total, second, losses


@pytest.mark.parametrize("density", [0.05, 0.17])
def test_free_reference_lowers_the_peak_by_the_second_model_less_its_values(density: float, tmp_path: Path) -> None:
    with_second, second, losses = peak_of(tmp_path / "second", density=density, free=False)
    with_free, _, same_losses = peak_of(tmp_path / "free", density=density, free=True)
    assert same_losses == losses
    saved = (with_second - with_free) / second
    assert saved >= 0.8
    assert saved == pytest.approx(1 - density, abs=0.03)  # the bits of the mask are those of the optimizer
