"""A masked run of any trainer, and what is read off it: weights, state, and its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from helpers import random_mask, same_bits
from training.every_trainer import base_model, build
from transformers import Trainer, TrainerCallback

from subnet_ft.masks import SubnetMask, canonical_name
from subnet_ft.training import restrict

FROZEN = "model.layers.0.self_attn.q_proj.weight"
"""A tensor of which nothing is trained."""

Weights = dict[str, torch.Tensor]
State = dict[str, dict[str, Any]]


def restricted(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    restrict_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Trainer, SubnetMask]:
    """Build a trainer and restrict it to a random third of each tensor, except `FROZEN`."""
    model = base_model(name, dtype)
    mask = third_of(model)
    trainer = build(name, folder, model=model, **options)
    return restrict(trainer, mask, **restrict_options or {}), mask


def third_of(model: torch.nn.Module) -> SubnetMask:
    """Mask a third of every tensor and nothing of `FROZEN`."""
    drawn = random_mask(model, 0.3)
    return SubnetMask.from_dense(
        {key: drawn[key] if key != FROZEN else torch.zeros_like(drawn[key]) for key in drawn.names}
    )


def check_weights(model: torch.nn.Module, mask: SubnetMask, start: Weights) -> None:
    """Assert that off the mask every weight has the bits of `start`, and that most of those on it moved."""
    moved = chosen = 0
    for key, value in weights_of(model).items():
        subnet_mask = mask[key]
        assert same_bits(value[~subnet_mask], start[key][~subnet_mask]), f"off the mask of {key}"
        changed = int((value[subnet_mask] != start[key][subnet_mask]).sum())
        assert changed or not subnet_mask.any(), f"nothing moved on the mask of {key}"
        moved, chosen = moved + changed, chosen + int(subnet_mask.sum())
    assert moved > 0.5 * chosen


def weights_of(model: torch.nn.Module) -> Weights:
    """Return copies of the weights under the names of a mask."""
    return {canonical_name(key): value.detach().clone() for key, value in model.named_parameters()}


def optimizer_of(trainer: Trainer) -> Any:
    """Return the masked optimizer, without the wrapper that accelerate puts around it."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def state_of(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Return copies of the optimizer's state by name."""
    state = optimizer_of(trainer).state_dict()["state"]
    return {
        key: {entry: value.clone() if isinstance(value, torch.Tensor) else value for entry, value in entries.items()}
        for key, entries in state.items()
    }


def same_weights(a: Weights, b: Weights) -> None:
    """Assert that two sets of weights are the same, bit by bit."""
    assert a.keys() == b.keys()
    assert [key for key in a if not same_bits(a[key], b[key])] == []


def same_state(a: State, b: State) -> None:
    """Assert that two states of an optimizer are the same, bit by bit."""
    assert a.keys() == b.keys()
    for key, entries in a.items():
        assert entries.keys() == b[key].keys()
        for entry, value in entries.items():
            other = b[key][entry]
            same = same_bits(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, f"{entry} of {key}"


class Watch(TrainerCallback):
    """Calls back with the number of a step: before it but after clipping, right after it, and at its end.

    Between the last two the schedule moves on.
    """

    def __init__(
        self,
        *,
        before: Callable[[int], Any] | None = None,
        after: Callable[[int], Any] | None = None,
        end: Callable[[int], Any] | None = None,
    ) -> None:
        self.before, self.after, self.end = before, after, end

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.before:
            self.before(state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.after:
            self.after(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.end:
            self.end(state.global_step)


def each_step(trainer: Trainer) -> list[tuple[Weights, State]]:
    """Return a list that gets the weights and the state at the end of every step."""
    seen: list[tuple[Weights, State]] = []
    trainer.add_callback(Watch(end=lambda step: seen.append((weights_of(trainer.model), state_of(trainer)))))
    return seen


def losses_of(trainer: Trainer) -> list[tuple[Any, ...]]:
    """Return what the logs say about every step, without times."""
    keys = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(entry[key] for key in keys) for entry in trainer.state.log_history if "loss" in entry]
