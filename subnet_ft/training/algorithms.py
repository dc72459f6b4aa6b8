"""From a recipe's `training` section to the config of its algorithm."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from subnet_ft.checkpoints.quantized import keep_offline
from subnet_ft.processes import num_processes
from subnet_ft.recipe.algorithms import ALGORITHMS, Algorithm

__all__ = ["ALGORITHMS", "Algorithm", "build_config", "config_fields", "run_config"]

# TRL imports PEFT, and PEFT bitsandbytes.
keep_offline()

# TRL before 1.16, the newest for Python 3.10, knows this field by its old name.
_OLD_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


def build_config(algorithm: Algorithm, arguments: Mapping[str, Any]) -> Any:
    """Build an algorithm's TRL config; a field that this TRL knows by an older name is passed under that one.

    Args:
        algorithm: Whose config.
        arguments: Field name to value.
    """
    known = {field.name for field in fields(algorithm.config_class)}
    return algorithm.config_class(**{_name_in(known, name): value for name, value in arguments.items()})


def run_config(
    algorithm: Algorithm, training: Mapping[str, Any], *, output_dir: str, seed: int, optim: str = "adamw_torch"
) -> Any:
    """Build the TRL config of a run: what every run and its algorithm set, and what the recipe changes.

    Args:
        algorithm: Whose config.
        training: The recipe's section.
        output_dir: The trainer's folder.
        seed: The recipe's seed.
        optim: transformers' name of the optimizer, of which the masked form is used.
    """
    import torch

    return build_config(
        algorithm,
        {
            "save_strategy": "steps" if "save_steps" in training else "no",
            "bf16": False,  # the weights already are in the recipe's dtype; mixed precision would add casts
            "report_to": "none",
            "dataloader_pin_memory": torch.cuda.is_available(),
            **_joined_on_cpus(),
            **algorithm.defaults,
            **training,
            **algorithm.fixed,
            "output_dir": output_dir,
            "seed": seed,
            "optim": optim,
        },
    )


def _joined_on_cpus() -> dict[str, Any]:
    """Say that the processes of a launch without accelerators train on CPUs; else accelerate would not join them."""
    import torch

    has_device = torch.accelerator.is_available()
    asks_for_shards = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"  # which accelerate does not make on CPUs
    return {"use_cpu": True} if num_processes() > 1 and not has_device and not asks_for_shards else {}


def _name_in(known: set[str], name: str) -> str:
    return name if name in known else _OLD_NAMES.get(name, name)


def config_fields() -> Mapping[str, Mapping[str, Any]]:
    """Return every algorithm's config fields with their types; looking one up imports TRL, which takes seconds."""
    return _ConfigFields()


class _ConfigFields(Mapping[str, Mapping[str, Any]]):
    """Imports only what is looked up: some configs are TRL's experimental ones."""

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        config = ALGORITHMS[name].config_class
        hints = typing.get_type_hints(config)
        known = {field.name: hints[field.name] for field in fields(config) if field.init}
        aliases = {new: known[old] for new, old in _OLD_NAMES.items() if old in known}
        return {**aliases, **known}

    def __contains__(self, name: object) -> bool:
        return name in ALGORITHMS

    def __iter__(self) -> Iterator[str]:
        return iter(ALGORITHMS)

    def __len__(self) -> int:
        return len(ALGORITHMS)
