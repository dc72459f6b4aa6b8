"""Trainer checkpoints of models that FSDP2 shards: whole files that anybody reads, or a part per process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.models import save_config
from subnet_ft.checkpoints.parts import SHARDED
from subnet_ft.errors import CheckpointError
from subnet_ft.masks import by_canonical_name
from subnet_ft.optim import full_state_dict, load_sharded, save_sharded
from subnet_ft.optim.sharded_state import FACTS, load_sharded_weights, persistent_buffers
from subnet_ft.optim.shards import is_sharded, local_flat, part_of
from subnet_ft.training.delta_checkpoints import holds_delta, load_delta

logger = logging.getLogger(__name__)

OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
BUFFERS = "subnet_buffers.pt"
"""Persistent buffers of a model that FSDP2 shards, beside its whole weights."""


def is_in_parts(checkpoint: Path) -> bool:
    """Whether a checkpoint was written in parts."""
    return (checkpoint / SHARDED / FACTS).is_file()


def saves_in_parts(trainer: Any) -> bool:
    """Whether a trainer under FSDP2 is asked for a part per process (`state_dict_type`), not for whole files."""
    plugin = trainer.accelerator.state.fsdp_plugin
    return bool(trainer.is_fsdp_enabled) and "FULL" not in str(plugin.state_dict_type)


def save_optimizer(trainer: Any, checkpoint: Path) -> None:
    """Save optimizer and schedule, and the weights with them where each process writes its part; all call it."""
    model, optimizer = trainer._own_model, trainer.masked_optimizer
    if saves_in_parts(trainer):
        save_sharded(model, optimizer, checkpoint / SHARDED)
        if trainer.args.should_save:
            save_config(model, checkpoint)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(checkpoint)
    else:
        whole = full_state_dict(optimizer, keep=trainer.args.should_save)
        if trainer.args.should_save:
            torch.save(whole, checkpoint / OPTIMIZER)
            torch.save(persistent_buffers(model), checkpoint / BUFFERS)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), checkpoint / SCHEDULER)


def load_optimizer(trainer: Any, checkpoint: Path) -> None:
    """Load what any number of processes saved, under FSDP2 or not; where that is in parts, the weights, too."""
    if is_in_parts(checkpoint):
        load_sharded(trainer._own_model, trainer.masked_optimizer, checkpoint / SHARDED)
    else:
        saved = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
        trainer.masked_optimizer.load_state_dict(saved)
    trainer.lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER, weights_only=True))


def load_model_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Overwrite what this process holds of a model's parameters by the weights of a checkpoint.

    Raises:
        CheckpointError: The checkpoint lacks a parameter, or cannot be read.
    """
    if is_in_parts(checkpoint):
        load_sharded_weights(model, checkpoint / SHARDED)
        return
    if holds_delta(checkpoint):
        load_delta(model, checkpoint)
        return
    parameters = by_canonical_name(model.named_parameters())
    left = set(parameters)
    with torch.no_grad():
        for name, stored in open_checkpoint(str(checkpoint)).tensors():
            if name not in left:
                continue
            left.discard(name)
            parameter = parameters[name]
            if not is_sharded(parameter):
                parameter.copy_(stored)
                continue
            part = part_of(name, parameter)
            local_flat(parameter).copy_(stored.reshape(-1)[part.start : part.start + part.num_elements])
    buffers = persistent_buffers(model)
    if buffers and (checkpoint / BUFFERS).is_file():
        for name, stored in torch.load(checkpoint / BUFFERS, map_location="cpu", weights_only=True).items():
            buffers[name].copy_(stored)
    if left:
        raise CheckpointError(f"`{checkpoint}` has no weights for `{min(left)}` of this model.")
