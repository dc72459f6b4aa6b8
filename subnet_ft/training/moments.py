"""Reading what AdamW knew of every weight from the checkpoint of a full run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

import subnet_kernels
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.errors import OptimizerStateError
from subnet_ft.masks import SubnetMask
from subnet_ft.masks.moments import Moments

_NEXT = "Name a `checkpoint-STEP` folder of a full run with AdamW that was kept (`keep_checkpoints: true`)."


class SavedMoments:
    """The moments in a trainer's checkpoint, one tensor after another, as often as one iterates.

    Invariant: what is not asked for stays in the file; only masters that were saved as remainders are built, one tensor
    at a time.

    Args:
        folder: The checkpoint.

    Raises:
        OptimizerStateError: It holds no AdamW state of a full run.
        CheckpointError: Its model cannot be read.
    """

    step: int
    """Optimizer steps that the run had taken."""

    total_steps: int
    """Optimizer steps that the run was set up for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.step, self.total_steps = _steps(self.folder)
        saved = _load(self.folder)
        self._groups: dict[str, dict[str, Any]] = {
            name: group for group in saved["param_groups"] for name in group["params"]
        }
        self._state: dict[str, dict[str, Any]] = saved["state"]
        self._weights = open_checkpoint(self.folder)
        shapes = {name: tuple(spec.shape) for name, spec in self._weights.specs.items()}
        full = SubnetMask.full(shapes)
        for name, group in self._groups.items():
            if group["mask_fingerprint"] != full.fingerprint:
                raise OptimizerStateError(
                    f"`{folder}` is of a run that trained mask {group['mask_fingerprint'][:16]}, not all weights "
                    f"({full.fingerprint[:16]}), so it knows nothing of those outside. {_NEXT}"
                )
            if name in self._state:
                _check_entries(self.folder, name, group, self._state[name], full.tensors[name].count)

    @property
    def names(self) -> list[str]:
        """The tensors that took a step, in the order of iteration; the others never got a gradient."""
        return list(self._state)

    def __iter__(self) -> Iterator[tuple[str, Moments]]:
        for name, entries in self._state.items():
            group = self._groups[name]
            beta1, beta2 = group["betas"]
            yield (
                name,
                Moments(
                    exp_avg=entries["exp_avg"],
                    exp_avg_sq=entries["exp_avg_sq"],
                    master=self._master(name, entries.get("master"), group["master"]),
                    step=int(entries["step"]),
                    beta1=float(beta1),
                    beta2=float(beta2),
                    eps=float(group["eps"]),
                    lr=float(group["lr"]),
                ),
            )

    def _master(self, name: str, saved: torch.Tensor | None, kind: str) -> torch.Tensor | None:
        if saved is not None and saved.dtype == torch.float32:
            return saved
        if kind == "none":  # its remainders are zero after every step
            return None
        if saved is not None:
            return subnet_kernels.join_master(self._weights.tensor(name).view(-1), saved)
        return self._weights.tensor(name).view(-1) if self._weights.specs[name].dtype == torch.float32 else None


def read_moments(trainer_checkpoint: str | Path) -> SavedMoments:
    """Open the moments of a full run for iteration over pairs of name and `Moments`.

    Nothing is unpickled, and the tensors stay mapped from the file.

    Args:
        trainer_checkpoint: A `checkpoint-STEP` folder, with the optimizer's state.

    Raises:
        OptimizerStateError: It has no such state, or that of a masked run, of SGD, or of an optimizer that was wrapped,
            such as one with moments in 8 bits.
        CheckpointError: Its model cannot be read.
    """
    return SavedMoments(trainer_checkpoint)


def _load(folder: Path) -> dict[str, Any]:
    path = folder / "optimizer.pt"
    if not path.is_file():
        raise OptimizerStateError(f"`{folder}` has no `{path.name}`: there is no optimizer state in it. {_NEXT}")
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, ValueError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OptimizerStateError(f"torch cannot read `{path}`: {reason} {_NEXT}") from error
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if not groups or not all("mask_fingerprint" in group for group in groups):
        raise OptimizerStateError(
            f"`{path}` is not the state of a masked optimizer, which is keyed by name and says its mask. {_NEXT}"
        )
    wrapped = next((group["optimizer_class"] for group in groups if group.get("optimizer_class")), None)
    if wrapped is not None:
        raise OptimizerStateError(
            f"`{folder}` was trained with `{wrapped}`, whose state is its own (8-bit moments are coarse by design). "
            f"Train the first steps with `subnet.optimizer.name: adamw`. {_NEXT}"
        )
    if not all("betas" in group for group in groups):
        raise OptimizerStateError(
            f"`{folder}` was trained with SGD, which keeps no moments. Train the first steps with "
            f"`subnet.optimizer.name: adamw`. {_NEXT}"
        )
    return saved


def _check_entries(
    folder: Path, name: str, group: Mapping[str, Any], entries: Mapping[str, Any], num_elements: int
) -> None:
    for key in ("exp_avg", "exp_avg_sq", "master"):
        value = entries.get(key)
        if value is None and key == "master":
            continue
        dtypes = (torch.float32, torch.int16) if key == "master" else (torch.float32,)
        if not isinstance(value, torch.Tensor) or value.dtype not in dtypes or value.shape != (num_elements,):
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise OptimizerStateError(
                f"`{key}` of `{name}` in `{folder}` is {found}, expected float32 ({num_elements},), one number for "
                f"every weight. {_NEXT}"
            )


def _steps(folder: Path) -> tuple[int, int]:
    path = folder / "trainer_state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptimizerStateError(
            f"`{folder}` is no checkpoint of a trainer: `{path.name}` is missing, or has no `global_step` or "
            f"`max_steps`. {_NEXT}"
        ) from error
