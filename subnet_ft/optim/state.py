"""Saving and loading the compact optimizer state.

The saved form is keyed by parameter name, because trainers replace parameter objects. Every param group carries the
mask's fingerprint, because checkpointing tools keep param groups and drop what else they do not know.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.errors import OptimizerStateError
from subnet_ft.optim.compact_shard import CompactRange, CompactShard

if TYPE_CHECKING:
    from subnet_ft.optim.base import MaskedBase
    from subnet_ft.optim.saved_state import SavedState

FROZEN = "frozen_fingerprints"
"""Key in the first saved param group: name to fingerprint of the weights outside the mask."""


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


def mark_parts(optimizer: SavedState, saved: Mapping[str, Any]) -> None:
    """Replace compact entries (K_local,) of parameters that processes hold in parts by `CompactShard`s. In-out."""
    groups = {name: group for group in saved["param_groups"] for name in group["params"]}
    for name, values in saved["state"].items():
        held = optimizer.compact_range(name)
        if held.group is None:
            continue
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and optimizer.is_compact(groups[name], key, value):
                values[key] = CompactShard.of(value, held.start, held.count)


def own_parts(values: Mapping[str, Any], held: CompactRange, name: str) -> dict[str, Any]:
    """Return saved entries of a tensor with the compact ones as this process holds them, (K_local,).

    Raises:
        OptimizerStateError: A part belongs to another process.
    """
    found = dict(values)
    for key, value in values.items():
        if isinstance(value, CompactShard):
            if (value.start, value.values.numel(), value.count) != (held.start, held.length, held.count):
                raise OptimizerStateError(
                    f"The saved `{key}` of `{name}` is {value!r}, and this process holds {held.length} of {held.count} "
                    f"from {held.start} on. Load it with `load_sharded`, which takes other numbers of processes."
                )
            found[key] = value.values
        elif held.group is not None and isinstance(value, torch.Tensor) and value.shape == (held.count,):
            found[key] = value[held.start : held.start + held.length]
        elif held.group is not None and isinstance(value, torch.Tensor) and value.dim():
            raise OptimizerStateError(
                f"The saved `{key}` of `{name}` has shape {tuple(value.shape)}, and processes hold parts of "
                f"{held.count} values: nobody knows whose it is. Resume without FSDP2, or with MaskedAdamW."
            )
    return found


def load(optimizer: MaskedBase, state_dict: Mapping[str, Any]) -> None:
    """Check a saved state as a whole, then make it the optimizer's; what is refused changes nothing.

    Raises:
        OptimizerStateError: The state does not fit.
    """
    own = {
        name: own_parts(values, optimizer.compact_range(name), name) if optimizer.trains(name) else values
        for name, values in state_dict["state"].items()
    }
    state_dict = {**state_dict, "state": own}
    loaded = checked_state(optimizer.param_groups, optimizer._names, state_dict, optimizer._checked_entries)
    frozen = state_dict["param_groups"][0].get(FROZEN)
    if frozen is not None:
        check_frozen(frozen, optimizer._frozen.now())
    optimizer._frozen.taken = None if frozen is None else dict(frozen)
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key not in ("params", FROZEN)})
    optimizer._adopt(loaded)


def checked_state(
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[torch.nn.Parameter, str],
    state_dict: Mapping[str, Any],
    check_entries: Callable[[torch.nn.Parameter, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]],
) -> dict[torch.nn.Parameter, dict[str, Any]]:
    """Check what `keyed_by_name` returned as a whole, and return copies of its entries by parameter.

    Args:
        groups: The optimizer's param groups.
        names: Parameter to name.
        state_dict: The saved state.
        check_entries: Takes a parameter, its saved entries and its saved group; returns copies of the entries, or
            raises.

    Raises:
        OptimizerStateError: The state does not fit.
    """
    saved_groups = state_dict["param_groups"]
    check_groups(groups, names, saved_groups)
    places: dict[str, tuple[torch.nn.Parameter, Mapping[str, Any]]] = {}
    for group, saved in zip(groups, saved_groups, strict=True):
        places.update({names[parameter]: (parameter, saved) for parameter in group["params"]})
    loaded: dict[torch.nn.Parameter, dict[str, Any]] = {}
    for name, values in state_dict["state"].items():
        if name not in places:
            raise OptimizerStateError(f"The saved state has values for `{name}`, which this optimizer does not train.")
        parameter, saved = places[name]
        loaded[parameter] = check_entries(parameter, values, saved)
    return loaded


def check_groups(
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[torch.nn.Parameter, str],
    saved_groups: Sequence[Mapping[str, Any]],
) -> None:
    """Check the param groups of a saved state.

    Raises:
        OptimizerStateError: They belong to another mask, another kind of optimizer or other parameters.
    """
    if len(saved_groups) != len(groups):
        raise OptimizerStateError(
            f"The saved state has {len(saved_groups)} param groups, this optimizer {len(groups)}."
        )
    for group, saved in zip(groups, saved_groups, strict=True):
        _check_group(group, saved, [names[parameter] for parameter in group["params"]])


def check_frozen(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Compare fingerprints of the weights outside the mask.

    Raises:
        OptimizerStateError: They differ: the state belongs to another base.
    """
    other = [name for name in now if saved.get(name) != now[name]]
    if other:
        raise OptimizerStateError(
            f"The saved state belongs to another base: outside the mask, `{other[0]}` had fingerprint "
            f"{saved.get(other[0])} and has {now[other[0]]} in this model ({len(other)} tensors differ). Load the "
            "weights that the state was saved with first, then the state."
        )


def check_keys(name: str, values: Collection[str], *, required: Collection[str], allowed: Collection[str]) -> None:
    """Check which entries the saved state of a parameter has.

    Raises:
        OptimizerStateError: A required one is missing, or one is not allowed.
    """
    problems = [f"`{key}` is missing" for key in required if key not in values]
    problems += [f"`{key}` is not known" for key in values if key not in allowed]
    if problems:
        raise OptimizerStateError(
            f"The saved state of `{name}` does not fit: {', '.join(problems)}. Resume with the weight dtype and the "
            "optimizer that the run was started with."
        )


def checked_tensor(
    name: str, key: str, value: object, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Return a copy on `device` of one entry, which must have a dtype and a shape.

    Raises:
        OptimizerStateError: It has another one, or is no tensor.
    """
    found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
    if not isinstance(value, torch.Tensor) or value.dtype != dtype:
        raise OptimizerStateError(f"The saved `{key}` of `{name}` is {found}, expected {dtype}.")
    if value.shape != shape:
        raise OptimizerStateError(f"The saved `{key}` of `{name}` has shape {tuple(value.shape)}, expected {shape}.")
    return value.to(device, copy=True)


def _check_group(group: Mapping[str, Any], saved: Mapping[str, Any], names: list[str]) -> None:
    if saved.get("mask_fingerprint") != group["mask_fingerprint"]:
        raise OptimizerStateError(
            f"The saved state belongs to mask {str(saved.get('mask_fingerprint'))[:16]}, this optimizer trains mask "
            f"{group['mask_fingerprint'][:16]}. Resume with the mask that the run was started with."
        )
    if saved.get("optimizer_class") != group.get("optimizer_class"):
        raise OptimizerStateError(
            f"The saved state is that of {_kind(saved)}, this optimizer is {_kind(group)}. Resume with the optimizer "
            "that the run was started with."
        )
    if saved.get("master") != group.get("master"):
        raise OptimizerStateError(
            f"The saved state has `master={saved.get('master')}`, this optimizer `master={group.get('master')}`. "
            "Resume with the setting that the run was started with."
        )
    if list(saved["params"]) != names:
        raise OptimizerStateError(
            f"The saved param group holds {len(saved['params'])} tensors, this one {len(names)}, or their order "
            "differs. Resume with the parameter groups that the run was started with."
        )


def _kind(group: Mapping[str, Any]) -> str:
    wrapped = group.get("optimizer_class")
    return "MaskedAdamW or MaskedSGD" if wrapped is None else f"MaskedOptimizer around `{wrapped}`"
