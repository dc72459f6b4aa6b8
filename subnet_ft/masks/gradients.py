"""Masks of the weights with the largest gradients in the first steps of a full run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

import subnet_kernels
from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.errors import MaskError
from subnet_ft.masks.fine_selection import ScorePieces, highest_overall
from subnet_ft.masks.mask import SubnetMask, TensorMask
from subnet_ft.masks.moments import Moments, check_moments
from subnet_ft.masks.provenance import COMPARE_DTYPES, Provenance
from subnet_ft.masks.record import record_base
from subnet_ft.masks.selection import generator_of, lowest, magnitude_keys, tiles

GRADIENT_KINDS = ("gradient", "fisher")
SCOPES = ("tensor", "global")


def gradient_mask(
    checkpoint: str | Path | Checkpoint,
    moments: Iterable[tuple[str, Moments]],
    kind: str,
    *,
    density: float,
    scope: str = "tensor",
    dtype: str | None = None,
    seed: int = 0,
) -> SubnetMask:
    """Choose the weights whose gradients were largest.

    For gradients at the base itself, the moments come from steps with a learning rate of zero.

    Args:
        checkpoint: The base.
        moments: Name and moments of every tensor that took a step, such as `subnet_ft.training.moments.read_moments`
            gives; iterated over several times. A tensor that it lacks got no gradient, and no trainable weight.
        kind: `gradient`: by the size of the mean gradient. `fisher`: by the mean of the squared gradient, which is the
            diagonal of the empirical Fisher matrix where every step saw one sample, and a stand-in for it elsewhere.
        density: Share of the weights to choose, in (0, 1].
        scope: `tensor`: this share of every tensor, rounded to whole weights. `global`: of the whole model by one
            threshold, so that tensors with large gradients get more.
        dtype: The dtype in which the weights are trained, where they are stored in another one.
        seed: Decides which of equal weights are taken.

    Raises:
        MaskError: An argument is unknown or out of range, or the moments are not those of this model.
        CheckpointError: The checkpoint cannot be found or read.
    """
    if kind not in GRADIENT_KINDS:
        raise MaskError(f"`{kind}` is not a mask of gradients; choose one of {', '.join(GRADIENT_KINDS)}.")
    if scope not in SCOPES:
        raise MaskError(f"`scope` must be one of {', '.join(SCOPES)}, got {scope!r}.")
    if not 0 < density <= 1:
        raise MaskError(f"`density` must be in (0, 1], got {density!r}.")
    if dtype is not None and dtype not in COMPARE_DTYPES:
        raise MaskError(f"`dtype` must be one of {', '.join(COMPARE_DTYPES)}, got {dtype!r}.")
    base = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    shapes = {name: tuple(spec.shape) for name, spec in base.specs.items()}
    step = check_moments(moments, shapes)
    if scope == "global":
        count = round(density * sum(math.prod(shape) for shape in shapes.values()))
        tensors = highest_overall(partial(_pieces, moments, kind), shapes, count, seed=seed)
    else:
        tensors = {name: TensorMask.build(torch.empty(0, dtype=torch.uint8), shape) for name, shape in shapes.items()}
        for name, found in moments:
            keys = magnitude_keys(_scores(found, kind), largest_first=True)
            chosen = lowest(keys, round(density * keys.size), generator_of(seed, name))
            tensors[name] = TensorMask.build(subnet_kernels.pack_bits(chosen), shapes[name])
    source = {"kind": kind, "step": step, "density": density, "scope": scope, "seed": seed}
    return SubnetMask(tensors, Provenance(base=record_base(base, dtype=dtype), compare_dtype=dtype, source=source))


def _scores(moments: Moments, kind: str) -> torch.Tensor:
    return moments.mean_gradient().abs() if kind == "gradient" else moments.mean_square()


def _pieces(moments: Iterable[tuple[str, Moments]], kind: str) -> ScorePieces:
    for name, found in moments:
        scores = _scores(found, kind)
        for tile in tiles(scores.numel()):
            yield name, scores[tile]
