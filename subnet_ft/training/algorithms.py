"""The table of algorithms: which TRL trainer and config each one is."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Algorithm:
    """One algorithm, by the names of what runs it; nothing is imported before it is needed.

    Args:
        name: The recipe's `algorithm`.
        trainer: `module:class` of the trainer.
        config: `module:class` of its config, whose fields are the recipe's `training` section.
    """

    name: str
    trainer: str
    config: str

    @property
    def trainer_class(self) -> Any:
        """The trainer class."""
        return _load(self.trainer)

    @property
    def config_class(self) -> Any:
        """The config dataclass."""
        return _load(self.config)


ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("dpo", "trl:DPOTrainer", "trl:DPOConfig"),
        Algorithm("grpo", "trl:GRPOTrainer", "trl:GRPOConfig"),
    )
}


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
    """Build the TRL config of a run: what every run sets, what a recipe may change, and what it may not.

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
            **training,
            "output_dir": output_dir,
            "seed": seed,
            "optim": optim,
        },
    )


def _name_in(known: set[str], name: str) -> str:
    return name if name in known else _OLD_NAMES.get(name, name)


def config_fields() -> Mapping[str, Mapping[str, Any]]:
    """Return every algorithm's config fields with their types; importing TRL takes a few seconds."""
    table: dict[str, dict[str, Any]] = {}
    for name, algorithm in ALGORITHMS.items():
        hints = typing.get_type_hints(algorithm.config_class)
        known = {field.name: hints[field.name] for field in fields(algorithm.config_class) if field.init}
        aliases = {new: known[old] for new, old in _OLD_NAMES.items() if old in known}
        table[name] = {**aliases, **known}
    return table


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
