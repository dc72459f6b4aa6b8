"""The parameters that a masked optimizer is built on: named, in groups, and checked against the mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from subnet_ft.errors import MaskMismatchError
from subnet_ft.masks import SubnetMask, by_canonical_name
from subnet_ft.optim.fingerprints import fingerprints
from subnet_ft.optim.shards import local

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]

_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def named_groups(named_parameters: NamedParameters | Iterable[dict[str, Any]], owner: str) -> list[dict[str, Any]]:
    """Return groups whose `params` are lists of pairs of name and parameter.

    Args:
        named_parameters: Such pairs, or such groups.
        owner: The optimizer's name, for the message.

    Raises:
        TypeError: A parameter comes without its name.
    """
    items: list[Any] = list(named_parameters)
    groups = items if items and all(isinstance(item, dict) for item in items) else [{"params": items}]
    named: list[dict[str, Any]] = []
    for group in groups:
        pairs = list(group["params"])
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise TypeError(
                f"{owner} finds a parameter's mask by its name: pass `model.named_parameters()`, or groups with such "
                "pairs under `params`."
            )
        named.append({**group, "params": pairs})
    return named


class ParameterGroups:
    """All parameters of a model in their groups, also those that no mask trains so far.

    Args:
        groups: What `named_groups` returned.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        self._groups = [{**group, "params": list(by_canonical_name(group["params"]).items())} for group in groups]

    def replace(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Put other parameters in the place of those of the same names."""
        for group in self._groups:
            group["params"] = [(name, parameters[name]) for name, _ in group["params"]]

    def trained(self, mask: SubnetMask) -> list[dict[str, Any]]:
        """Return the groups with the parameters in which the mask trains something, under canonical names.

        A group may be empty: its options belong to parameters that another mask may train.
        """
        groups = [
            {**group, "params": [pair for pair in group["params"] if mask.tensors[pair[0]].count]}
            for group in self._groups
        ]
        # torch takes names from the parameters, and all groups must have them.
        return [group if group["params"] else {**group, "param_names": []} for group in groups]


def check_parameters(parameters: Mapping[str, torch.nn.Parameter], mask: SubnetMask, *, check_base: bool) -> None:
    """Check names, shapes, dtypes and layout against the mask, and the weights if `check_base`.

    Raises:
        MaskMismatchError: Something differs, or the mask trains nothing.
    """
    mask.check_shapes({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    if not mask.num_trainable:
        raise MaskMismatchError("The mask has no trainable weight: nothing would be trained.")
    for name, parameter in parameters.items():
        if mask.tensors[name].count and parameter.dtype not in _WEIGHT_DTYPES:
            raise MaskMismatchError(
                f"`{name}` is {parameter.dtype}; masked training needs bfloat16, float16 or float32."
            )
        if mask.tensors[name].count and not local(parameter).is_contiguous():
            raise MaskMismatchError(f"`{name}` is not contiguous; call `.contiguous()` on it before training.")
    names: dict[int, str] = {}
    for name, parameter in parameters.items():
        other = names.setdefault(id(parameter), name)
        if other != name:
            raise MaskMismatchError(f"`{other}` and `{name}` are one parameter; a tied weight has one name in a mask.")
    if check_base:
        check_base_weights(parameters, mask)


def check_base_weights(parameters: Mapping[str, torch.nn.Parameter], mask: SubnetMask) -> None:
    """Check that these weights are those of the base that a mask was made for, as far as it records one.

    Raises:
        MaskMismatchError: One has another dtype or other bits.
    """
    if mask.provenance.base is None:
        return
    for name, sums in fingerprints(parameters).items():
        mask.check_fingerprint(name, parameters[name].dtype, sums)
