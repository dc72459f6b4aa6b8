"""The memory of weights, gradients, optimizer and mask in a real DPO step, persistent and at its peak, by component."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.bench.tracker import StorageTracker
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW, memory_ledger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSITY = 0.2
NUM_PAIRS = 8
_STEPS = 3  # state is made in the first, so later ones show what every step needs


def measure_memory(base: Path, *, density: float = DENSITY, master: str = "fp32") -> dict[str, Any]:
    """Train `base` for three DPO steps with TRL on a random mask and return a row of the bench.

    Dense gradients are what the trainer and autograd allocate in the shape of a trainable tensor, in whatever dtype,
    between the start of a step and its end; activations and logits are not counted, nor is the reference model.

    Args:
        base: Folder of a causal language model.
        density: Of the uniform random mask; 1 is the full run.
        master: As in `MaskedAdamW`.

    Returns:
        A row with `bytes_per_parameter` (persistent), `peak_bytes_per_parameter`, `memory` (persistent bytes by
        component) and `temporaries` (bytes by owner, each owner's largest).
    """
    from subnet_ft.checkpoints.models import load_model

    model, tokenizer = load_model(base, dtype="bfloat16")
    mask = _random_mask(model, density)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, tokenizer, Path(folder))
        tracker = StorageTracker(_owner_of(model))
        optimizer = _train(trainer, mask, master, tracker)
    memory = memory_ledger(model, optimizer)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    persistent = sum(memory.values())
    return {
        "op": "dpo_step",
        "method": f"subnet-ft, {master} masters",
        "density": density,
        "median_ms": None,
        "bytes_per_parameter": persistent / num_parameters,
        "peak_bytes_per_parameter": (persistent + tracker.peak) / num_parameters,
        "memory": memory,
        "temporaries": dict(sorted(tracker.highest.items())),
        "temporaries_at_peak": dict(sorted(tracker.at_peak.items())),
    }


def _train(trainer: Any, mask: SubnetMask, master: str, tracker: StorageTracker) -> MaskedAdamW:
    from transformers import TrainerCallback

    from subnet_ft.training import restrict

    entered = contextlib.ExitStack()

    class TrackLaterSteps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                entered.enter_context(tracker)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            entered.close()

    trainer.add_callback(TrackLaterSteps())
    restrict(trainer, mask, master=master)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, MaskedAdamW)
    return optimizer


def _trainer(model: PreTrainedModel, tokenizer: Any, folder: Path) -> Any:
    from datasets import Dataset

    from subnet_ft.training.algorithms import ALGORITHMS, run_config

    sums = [(a, b) for a in range(11, 11 + _STEPS * NUM_PAIRS) for b in (26,)]
    pairs = {
        "prompt": [f"8 + 13 = 21\n{a} + {b} =" for a, b in sums],
        "chosen": [f" {a + b}" for a, b in sums],
        "rejected": [f" {a + b + 10}" for a, b in sums],
    }
    algorithm = ALGORITHMS["dpo"]
    training = {
        "learning_rate": 2e-6, "max_steps": _STEPS, "per_device_train_batch_size": NUM_PAIRS, "beta": 0.1,
        "activation_checkpointing": False, "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    args = run_config(algorithm, training, output_dir=str(folder), seed=0)
    return algorithm.trainer_class(
        model=model, args=args, train_dataset=Dataset.from_dict(pairs), processing_class=tokenizer
    )


def _random_mask(model: PreTrainedModel, density: float) -> SubnetMask:
    if density == 1.0:
        return SubnetMask.full({name: tuple(p.shape) for name, p in model.named_parameters()})
    generator = torch.Generator().manual_seed(0)
    return SubnetMask.from_dense(
        {name: torch.rand(p.shape, generator=generator) < density for name, p in model.named_parameters()}
    )


def _owner_of(model: PreTrainedModel) -> Any:
    """Return a function that names the owner of a storage that has the shape of a trainable matrix."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
    shapes |= {shape[::-1] for shape in shapes}
    largest = {tuple(embedding.weight.shape), tuple(embedding.weight.shape)[::-1]}

    def owner_of(op: str, tensor: torch.Tensor) -> str | None:
        shape = tuple(tensor.shape)
        if shape not in shapes or not tensor.is_floating_point():
            return None
        dtype = str(tensor.dtype).removeprefix("torch.")
        what = "tied output embedding" if shape in largest else "one matrix at a time"
        return f"{what}, {dtype}, {op.removeprefix('aten.').partition('.')[0]}"

    return owner_of
