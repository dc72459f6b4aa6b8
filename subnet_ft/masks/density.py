"""Densities by decoder layer and by matrix kind."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from subnet_ft.masks.mask import SubnetMask

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")


def layer_and_kind(name: str) -> tuple[str, str]:
    """Split a parameter name into its decoder layer and its kind.

    Example:
        `model.layers.3.mlp.up_proj.weight` gives (`3`, `mlp.up_proj.weight`); `model.norm.weight` gives (`other`,
        `model.norm.weight`).
    """
    match = _LAYER.search(name)
    if match is None:
        return "other", name
    return match.group(1), name[match.end() :]


def density_by_layer(mask: SubnetMask) -> dict[str, float]:
    """Density of every decoder layer, in order, then of the tensors outside them under `other`."""
    densities = _grouped(mask, part=0)
    ordered = sorted((key for key in densities if key != "other"), key=int)
    return {key: densities[key] for key in [*ordered, *(["other"] if "other" in densities else [])]}


def density_by_kind(mask: SubnetMask) -> dict[str, float]:
    """Density of every matrix kind over all layers, in the model's order."""
    return _grouped(mask, part=1)


def _grouped(mask: SubnetMask, *, part: int) -> dict[str, float]:
    trainable: dict[str, int] = {}
    total: dict[str, int] = {}
    for name, tensor in mask.tensors.items():
        key = layer_and_kind(name)[part]
        trainable[key] = trainable.get(key, 0) + tensor.count
        total[key] = total.get(key, 0) + tensor.num_elements
    return {key: trainable[key] / max(total[key], 1) for key in total}
