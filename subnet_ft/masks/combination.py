"""Masks of several runs as one: what any, all or most of them trained, or the first alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch

from subnet_ft.errors import MaskError
from subnet_ft.masks.mask import SubnetMask, TensorMask
from subnet_ft.masks.provenance import Provenance
from subnet_ft.masks.selection import tiles

RULES = ("union", "intersection", "majority", "difference")

_TILE = 1 << 17  # bytes of a mask whose bits are counted at a time


def combine(masks: Sequence[SubnetMask], rule: str, *, at_least: int | None = None) -> SubnetMask:
    """Combine masks of one base, tensor by tensor.

    Args:
        masks: Two or more.
        rule: `union`: in any mask. `intersection`: in every mask. `majority`: in more than half of them, or in
            `at_least` of them. `difference`: in the first and in none of the others.
        at_least: Of `majority`, in [1, number of masks].

    Returns:
        The mask. Its source holds the fingerprints of the masks in their order (`of`) and their own sources.

    Raises:
        MaskError: The rule, the number of masks or `at_least` is invalid.
        MaskMismatchError: The masks have different tensors or were made for different bases.

    Example:
        [1, 1, 1, 0], [1, 1, 0, 0] and [1, 0, 0, 0] have the majority [1, 1, 0, 0] and the difference [0, 0, 1, 0].
    """
    needed = _needed(masks, rule, at_least)
    first = masks[0]
    owner = next((mask for mask in masks if mask.provenance.base is not None), first)
    for mask in masks:
        first.check_shapes({name: tensor.shape for name, tensor in mask.tensors.items()})
        owner.check_same_base(mask)
    tensors = {}
    for name, tensor in first.tensors.items():
        bits = [mask.tensors[name].full_bits() for mask in masks]
        combined = _without(bits[0], bits[1:]) if rule == "difference" else _in_at_least(needed, bits)
        tensors[name] = TensorMask.build(combined, tensor.shape)
    source: dict[str, Any] = {
        "kind": rule,
        "of": [mask.fingerprint for mask in masks],
        "sources": [mask.provenance.source for mask in masks],
    }
    if rule == "majority":
        source["at_least"] = needed
    return SubnetMask(
        tensors, Provenance(owner.provenance.base, compare_dtype=owner.provenance.compare_dtype, source=source)
    )


def _needed(masks: Sequence[SubnetMask], rule: str, at_least: int | None) -> int:
    """Check the arguments, and return in how many masks a weight must be."""
    if rule not in RULES:
        raise MaskError(f"`{rule}` is not a rule to combine masks by; choose one of {', '.join(RULES)}.")
    if len(masks) < 2:
        raise MaskError(f"Combining needs at least 2 masks, got {len(masks)}.")
    if at_least is not None:
        if rule != "majority":
            raise MaskError(f"`at_least` is for the rule `majority`, got {at_least} with `{rule}`.")
        if not 1 <= at_least <= len(masks):
            raise MaskError(f"`at_least` must be from 1 to the number of masks, {len(masks)}, got {at_least}.")
        return at_least
    return {"union": 1, "intersection": len(masks)}.get(rule, len(masks) // 2 + 1)


def _without(bits: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
    return bits & ~reduce(torch.bitwise_or, others)


def _in_at_least(needed: int, bits: list[torch.Tensor]) -> torch.Tensor:
    """Return (B,) uint8: the bits that at least `needed` of the (B,) uint8 `bits` have."""
    if needed == 1:
        return reduce(torch.bitwise_or, bits)
    if needed == len(bits):
        return reduce(torch.bitwise_and, bits)
    result = np.empty(bits[0].numel(), dtype=np.uint8)
    for tile in tiles(result.size, _TILE):
        votes = np.zeros(8 * (tile.stop - tile.start), dtype=np.int32)
        for mask in bits:
            votes += np.unpackbits(mask[tile].numpy())
        result[tile] = np.packbits(votes >= needed)
    return torch.from_numpy(result)
