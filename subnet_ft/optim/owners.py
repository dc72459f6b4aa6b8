"""Which masked optimizer a parameter belongs to; two of them would take each other's gradients."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping, MutableMapping

import torch
from torch.utils.weak import WeakIdKeyDictionary

from subnet_ft.errors import GradientError

_owners: MutableMapping[torch.Tensor, weakref.ref[object]] = WeakIdKeyDictionary()


def claim(parameters: Mapping[str, torch.nn.Parameter], owner: object) -> None:
    """Make `owner` the only one that takes the gradients of these parameters, by name, as long as it lives.

    Raises:
        GradientError: Another owner that is still alive has one of them.
    """
    if any(_owner(parameter) is not None for parameter in parameters.values()):
        gc.collect()  # an optimizer that nobody holds any more may wait in a cycle
    taken = [name for name, parameter in parameters.items() if _owner(parameter) is not None]
    if taken:
        raise GradientError(
            f"`{taken[0]}` and {len(taken) - 1} other parameters already belong to another masked optimizer, and "
            "two would take each other's gradients. Call its `release()` first."
        )
    for parameter in parameters.values():
        _owners[parameter] = weakref.ref(owner)


def owners_of(parameters: Iterable[torch.nn.Parameter]) -> list[object]:
    """Return who takes the gradients of these parameters, each owner once."""
    found = {id(owner): owner for parameter in parameters if (owner := _owner(parameter)) is not None}
    return list(found.values())


def disclaim(parameters: Iterable[torch.nn.Parameter], owner: object) -> None:
    """Let others have what `owner` has of these parameters."""
    for parameter in parameters:
        if _owner(parameter) is owner:
            del _owners[parameter]


def _owner(parameter: torch.nn.Parameter) -> object | None:
    reference = _owners.get(parameter)
    return None if reference is None else reference()
