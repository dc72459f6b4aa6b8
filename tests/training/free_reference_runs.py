"""Runs with a second model as the reference, and the same ones without: what both leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from training.every_trainer import base_model, build
from training.masked_runs import State, Weights, same_state, same_weights, state_of, third_of, weights_of

from subnet_ft.training import restrict
from subnet_ft.training.free_reference import take_reference_from_policy

WITH_KL: dict[str, dict[str, Any]] = {
    "DPO": {"beta": 0.1},
    "KTO": {"beta": 0.1},
    "GRPO": {"beta": 0.1},
    "RLOO": {"beta": 0.1},
    "PPO": {"kl_coef": 0.1},
    "PRIME": {},
}
"""Every trainer with a reference model, and what makes it hold one."""


@dataclass(frozen=True)
class Left:
    """What a run leaves.

    Args:
        logs: Its logged steps, without times.
        weights: Of the policy.
        state: Of the optimizer.
    """

    logs: list[dict[str, Any]]
    weights: Weights
    state: State


def trainer_with_reference(name: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """Build a trainer that holds a second model of the policy's base, in the policy's dtype."""
    trainer: Any = build(name, folder, model=base_model(name, dtype), **{**WITH_KL[name], **options})
    # DPO and KTO get theirs in bfloat16 here, and tiny models round their buffers, which loading does not.
    trainer.ref_model.to(dtype).load_state_dict(trainer.model.state_dict())
    for held, own in zip(trainer.ref_model.buffers(), trainer.model.buffers(), strict=True):
        held.data = own.clone()
    return trainer


def run(
    name: str,
    folder: Path,
    *,
    free: bool,
    restrict_options: Mapping[str, Any] | None = None,
    prepare: Callable[[Any], Any] = lambda trainer: None,
    resume: bool = False,
    **options: Any,
) -> Left:
    """Train on the usual mask, with the reference free or a second model."""
    trainer = trainer_with_reference(name, folder, **options)
    mask = third_of(trainer.model)
    if free:
        take_reference_from_policy(trainer, mask)
    restrict(trainer, mask, **restrict_options or {})
    prepare(trainer)
    trainer.train(resume_from_checkpoint=True if resume else None)
    return left_by(trainer)


def left_by(trainer: Any) -> Left:
    """Read off what a run left."""
    timed = ("runtime", "per_second", "_time")
    logs = [
        {key: value for key, value in entry.items() if not any(word in key for word in timed)}
        for entry in trainer.state.log_history
    ]
    return Left(logs, weights_of(trainer.model), state_of(trainer))


def same(a: Left, b: Left) -> None:
    """Assert that two runs left the same, to the last bit."""
    assert a.logs == b.logs
    same_weights(a.weights, b.weights)
    same_state(a.state, b.state)
