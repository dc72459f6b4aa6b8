"""What the examples share and you would not copy: a random mask, a few rows of data, and the check at the end."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from subnet_ft import SubnetMask

SUMS = [(f"{a} + {b} = ", str(a + b), str(a + b + 1)) for a in range(10) for b in (3, 4)]
"""Prompt, right answer, wrong answer."""


def random_mask(model: torch.nn.Module) -> SubnetMask:
    """Choose a fifth of every tensor: a stand-in for the mask that you extracted and saved."""
    draw = torch.Generator().manual_seed(0)
    return SubnetMask.from_dense(
        {name: torch.rand(weight.shape, generator=draw) < 0.2 for name, weight in model.named_parameters()}
    )


def copy_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy the weights, to compare with them later."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def batches(tokenizer: Any, size: int = 4) -> list[torch.Tensor]:
    """Tokenize the right sums into (size, length) batches, padded on the left."""
    rows = tokenizer([prompt + answer for prompt, answer, _ in SUMS], padding=True, return_tensors="pt")["input_ids"]
    return list(rows.split(size))


def trainer_options(steps: int = 2) -> dict[str, Any]:
    """Options of a `TrainingArguments`, or of a config of TRL, for a run of seconds on the CPU that saves nothing."""
    return {
        "output_dir": tempfile.gettempdir(),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def report(what: str, model: torch.nn.Module, before: dict[str, torch.Tensor], mask: SubnetMask) -> None:
    """Print how many weights changed; stop if one outside the mask did, in a single bit, or if none inside did."""
    inside = outside = 0
    for name, weight in model.named_parameters():
        bits = torch.int16 if weight.element_size() == 2 else torch.int32
        changed = weight.detach().view(bits) != before[name].view(bits)
        inside += int((changed & mask[name]).sum())
        outside += int((changed & ~mask[name]).sum())
    if outside or not inside:
        raise SystemExit(f"{what}: {outside:,} weights outside the mask changed, and {inside:,} inside it.")
    print(
        f"{what}: {inside:,} of {mask.num_trainable:,} trainable weights changed, "
        f"0 of the other {mask.num_parameters - mask.num_trainable:,}"
    )
