"""The part of a trainer's state that transformers does not save: completions in use, what is trained beside, and the
random numbers that the order of the data came from.

Trainers that sample (GRPO, RLOO, Distillation) use a batch of completions over several steps. A resumed run must go on
with the same completions: others, from weights that have moved on, are another run.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from subnet_ft.errors import TrainerError
from subnet_ft.training.options import Stateful

logger = logging.getLogger(__name__)

_EXTRAS = "subnet_extras.pt"


def save_rollouts(trainer: Any, folder: Path) -> None:
    """Save the completions that a trainer has in use, and where in them it stands; each process its own."""
    if not hasattr(trainer, "_buffered_inputs"):
        return
    inputs = trainer._buffered_inputs
    strange = _strange(inputs)
    if strange is not None:
        logger.warning(
            "the completions in use hold a %s and cannot be saved; a run resumed in the middle of them samples anew",
            strange,
        )
        inputs = None
    args = trainer.args  # of distillation: completions serve one step
    every = getattr(args, "steps_per_generation", None) or args.gradient_accumulation_steps
    every *= getattr(trainer, "num_iterations", 1)
    state = {"step": int(trainer._step), "inputs": inputs, "are_used_up": int(trainer._step) % every == 0}
    torch.save(state, folder / _rollouts_name(trainer))


def completions_are_used_up(folder: Path) -> bool:
    """Whether the next step after a checkpoint samples anew, so that another number of processes may go on."""
    saved = torch.load(folder / "subnet_rollouts_0.pt", map_location="cpu", weights_only=True)
    return bool(saved.get("are_used_up", False))


def load_rollouts(trainer: Any, folder: Path, *, same_processes: bool = True) -> None:
    """Take the completions in use back.

    Args:
        trainer: The trainer. In-out.
        folder: The checkpoint.
        same_processes: As many processes go on as have written it; others sample anew, and count micro-batches anew.
    """
    if not hasattr(trainer, "_buffered_inputs"):
        return
    if not same_processes:
        trainer._step, trainer._buffered_inputs = 0, None
        return
    device = trainer.args.device
    path = folder / _rollouts_name(trainer)
    saved = torch.load(path, map_location="cpu" if device.type == "cpu" else device, weights_only=True)
    trainer._step, trainer._buffered_inputs = saved["step"], saved["inputs"]


def save_start(state: torch.Tensor, trainer: Any, folder: Path) -> None:
    """Save torch's random state at the start of training, where samplers draw their seeds; each process its own."""
    torch.save(state, folder / _start_name(trainer))


def load_start(trainer: Any, folder: Path) -> torch.Tensor:
    """Return torch's random state at the start of the run; a process that was not there takes that of the first."""
    path = folder / _start_name(trainer)
    state: torch.Tensor = torch.load(path if path.is_file() else folder / "subnet_start_0.pt", weights_only=True)
    return state


def save_extras(extras: dict[str, Stateful], folder: Path) -> None:
    """Save what is trained beside the model, by name.

    Raises:
        TrainerError: Something in a state could not be loaded again.
    """
    states = {name: part.state_dict() for name, part in extras.items()}
    for name, state in states.items():
        strange = _strange(state)
        if strange is not None:
            raise TrainerError(
                f"`{name}`, one of the extras, has a {strange} in its state, which torch does not load again with "
                "`weights_only=True`. Give it a `state_dict` of tensors, numbers, strings and containers of them."
            )
    if states:
        torch.save(states, folder / _EXTRAS)


def load_extras(extras: dict[str, Stateful], folder: Path) -> None:
    """Load what is trained beside the model.

    Raises:
        TrainerError: The checkpoint holds other parts.
    """
    path = folder / _EXTRAS
    saved = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else {}
    if saved.keys() != extras.keys():
        raise TrainerError(
            f"`{folder}` holds {sorted(saved) or 'nothing'} beside the model, this trainer "
            f"{sorted(extras) or 'nothing'}. Pass the same `extras` as when the run was started."
        )
    for name, part in extras.items():
        part.load_state_dict(saved[name])


def _rollouts_name(trainer: Any) -> str:
    return f"subnet_rollouts_{trainer.args.process_index}.pt"


def _start_name(trainer: Any) -> str:
    return f"subnet_start_{trainer.args.process_index}.pt"


def _strange(value: object) -> str | None:
    """Return the type of the first part that `torch.load(weights_only=True)` would refuse, if any."""
    if isinstance(value, dict):
        return next((found for item in value.values() if (found := _strange(item))), None)
    if isinstance(value, (list, tuple)):
        return next((found for item in value if (found := _strange(item))), None)
    return None if value is None or isinstance(value, (torch.Tensor, bool, int, float, str)) else type(value).__name__
