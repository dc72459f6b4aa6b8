"""Saving and loading the compact optimizer state.

The saved form is keyed by parameter name, because trainers replace parameter objects. Every param group carries the
mask's fingerprint, because checkpointing tools keep param groups and drop what else they do not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.errors import OptimizerStateError

if TYPE_CHECKING:
    from subnet_ft.optim.base import MaskedBase


def keyed_by_name(packed: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Replace the numbers that `torch.optim.Optimizer.state_dict` gives to parameters by their names.

    Args:
        packed: What torch returned: state by number, and param groups with lists of numbers.
        names: Parameter names in the order of the param groups.

    Returns:
        `{"state": {name: {...}}, "param_groups": [{..., "params": [name, ...]}]}`. A tensor that took no step yet has
        no state; reading `optimizer.state[parameter]` leaves an empty one, which is dropped.
    """
    return {
        "state": {names[number]: dict(values) for number, values in packed["state"].items() if values},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in packed["param_groups"]
        ],
    }


def load_state(optimizer: MaskedBase, names: Mapping[torch.nn.Parameter, str], state_dict: Mapping[str, Any]) -> None:
    """Load what `keyed_by_name` returned, after all of it was checked."""
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(optimizer.param_groups):
        raise OptimizerStateError(
            f"The saved state has {len(saved_groups)} param groups, this optimizer {len(optimizer.param_groups)}."
        )
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        _check_group(group, saved, [names[parameter] for parameter in group["params"]])
    parameters = {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}
    loaded: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for name, values in state_dict["state"].items():
        if name not in parameters:
            raise OptimizerStateError(f"The saved state has values for `{name}`, which this optimizer does not train.")
        count = optimizer.mask.tensors[name].count
        dtypes = optimizer.entry_dtypes(parameters[name])
        _check_keys(name, values, dtypes)
        loaded[parameters[name]] = {
            key: _checked(name, key, values[key], dtype, count, parameters[name].device)
            for key, dtype in dtypes.items()
        }
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    optimizer.state.clear()
    optimizer.state.update(loaded)


def _check_group(group: Mapping[str, Any], saved: Mapping[str, Any], names: list[str]) -> None:
    if saved.get("mask_fingerprint") != group["mask_fingerprint"]:
        raise OptimizerStateError(
            f"The saved state belongs to mask {str(saved.get('mask_fingerprint'))[:16]}, this optimizer trains mask "
            f"{group['mask_fingerprint'][:16]}. Resume with the mask that the run was started with."
        )
    if saved.get("master") != group.get("master"):
        raise OptimizerStateError(
            f"The saved state has `master={saved.get('master')}`, this optimizer `master={group.get('master')}`. Resume "
            "with the setting that the run was started with."
        )
    if list(saved["params"]) != names:
        raise OptimizerStateError(
            f"The saved param group holds {len(saved['params'])} tensors, this one {len(names)}, or their order "
            "differs. Resume with the parameter groups that the run was started with."
        )


def _check_keys(name: str, values: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> None:
    problems = [f"`{key}` is missing" for key in dtypes if key not in values]
    problems += [f"`{key}` is not known" for key in values if key not in dtypes]
    if problems:
        raise OptimizerStateError(
            f"The saved state of `{name}` does not fit: {', '.join(problems)}. Resume with the weight dtype and the "
            "optimizer that the run was started with."
        )


def _checked(name: str, key: str, value: object, dtype: torch.dtype, count: int, device: torch.device) -> torch.Tensor:
    """Return a copy of one entry where the optimizer wants it."""
    found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
    if not isinstance(value, torch.Tensor) or value.dtype != dtype:
        raise OptimizerStateError(f"The saved `{key}` of `{name}` is {found}, expected {dtype}.")
    shape = () if key == "step" else (count,)
    if value.shape != shape:
        raise OptimizerStateError(f"The saved `{key}` of `{name}` has shape {tuple(value.shape)}, expected {shape}.")
    # The step count is read by the host at every step: on a GPU each reading would wait for the device.
    return value.to("cpu" if key == "step" else device, copy=True)
