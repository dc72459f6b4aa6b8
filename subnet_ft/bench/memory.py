"""The memory of weights, gradients, optimizer and mask in a real DPO step, persistent and at its peak, by component."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.bench.owners import Owners, persistent_tensors
from subnet_ft.bench.tracker import StorageTracker
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW, memory_ledger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSITY = 0.2
NUM_PAIRS = 8
_STEPS = 3


def measure_memory(base: Path, *, density: float = DENSITY, master: str = "fp32") -> dict[str, Any]:
    """Train `base` for three DPO steps with TRL on a random mask and return a row of the bench.

    Temporaries are what the trainer, autograd and our optimizer allocate with as many elements as a trainable matrix,
    in whatever shape and dtype, what our code allocates from the size of the smallest matrix on, and large chunks of
    the output embedding; see `Owners`. Activations and logits are not counted, nor is the reference model, nor numpy's
    arrays.

    Args:
        base: Folder of a causal language model.
        density: Of the uniform random mask; 1 is the full run.
        master: As in `MaskedAdamW`.

    Returns:
        A row with `bytes_per_parameter` (persistent), `peak_bytes_per_parameter` (over all steps),
        `first_step_peak_bytes_per_parameter` (of the step that makes the state, as if all state stood from its start),
        `memory` (persistent bytes by component) and `temporaries` (bytes by owner, each owner's largest).
    """
    from subnet_ft.checkpoints.models import load_model

    model, tokenizer = load_model(base, dtype="bfloat16")
    mask = random_mask(model, density)
    with tempfile.TemporaryDirectory() as folder:
        trainer = dpo_trainer(model, tokenizer, Path(folder), steps=_STEPS)
        owners = Owners(model)
        tracker = StorageTracker(owners)
        optimizer = _train(trainer, mask, master, tracker)
    owners.check_tokens()
    first, later = tracker.peaks(without=persistent_tensors(optimizer))
    highest = max(first, later, key=lambda peak: peak.total)
    memory = memory_ledger(model, optimizer)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    persistent = sum(memory.values())
    return {
        "op": "dpo_step",
        "method": f"subnet-ft, {master} masters",
        "density": density,
        "median_ms": None,
        "bytes_per_parameter": persistent / num_parameters,
        "peak_bytes_per_parameter": (persistent + highest.total) / num_parameters,
        "first_step_peak_bytes_per_parameter": (persistent + first.total) / num_parameters,
        "memory": memory,
        "temporaries": {
            owner: max(peak.highest.get(owner, 0) for peak in (first, later))
            for owner in sorted({*first.highest, *later.highest})
        },
        "temporaries_at_peak": dict(sorted(highest.parts.items())),
    }


def _train(trainer: Any, mask: SubnetMask, master: str, tracker: StorageTracker) -> MaskedAdamW:
    from transformers import TrainerCallback

    from subnet_ft.training import restrict

    entered = contextlib.ExitStack()

    class TrackSteps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                entered.enter_context(tracker)
            elif state.global_step == 1:
                tracker.mark()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            entered.close()

    trainer.add_callback(TrackSteps())
    restrict(trainer, mask, master=master)
    trainer.train()
    optimizer = trainer.masked_optimizer
    assert isinstance(optimizer, MaskedAdamW)
    return optimizer


def dpo_trainer(model: PreTrainedModel, tokenizer: Any, folder: Path, *, steps: int) -> Any:
    """Return a trainer of `steps` DPO steps of eight pairs each."""
    from datasets import Dataset

    from subnet_ft.training.algorithms import ALGORITHMS, run_config

    sums = [(a, b) for a in range(11, 11 + steps * NUM_PAIRS) for b in (26,)]
    pairs = {
        "prompt": [f"8 + 13 = 21\n{a} + {b} =" for a, b in sums],
        "chosen": [f" {a + b}" for a, b in sums],
        "rejected": [f" {a + b + 10}" for a, b in sums],
    }
    algorithm = ALGORITHMS["dpo"]
    training = {
        "learning_rate": 2e-6, "max_steps": steps, "per_device_train_batch_size": NUM_PAIRS, "beta": 0.1,
        "activation_checkpointing": False, "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    args = run_config(algorithm, training, output_dir=str(folder), seed=0)
    return algorithm.trainer_class(
        model=model, args=args, train_dataset=Dataset.from_dict(pairs), processing_class=tokenizer
    )


def random_mask(model: PreTrainedModel, density: float) -> SubnetMask:
    """Return a uniform random mask."""
    if density == 1.0:
        return SubnetMask.full({name: tuple(p.shape) for name, p in model.named_parameters()})
    generator = torch.Generator().manual_seed(0)
    return SubnetMask.from_dense(
        {name: torch.rand(p.shape, generator=generator) < density for name, p in model.named_parameters()}
    )
