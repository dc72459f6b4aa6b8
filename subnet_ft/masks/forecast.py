"""The forecast: which weights a whole run will change, from its base and the state of AdamW after a few steps.

A stored weight changes when its float32 master has drifted past the middle between it and a neighbour. Where the master
will be is known but for the gradients to come:

    drift at the end = drift so far - lr * carry * exp_avg / d - lr * sum of f(s) * g(s) / d over the steps s to come,

with d = sqrt(bias-corrected exp_avg_sq) + eps, `carry` what momentum still does with the gradients seen, and f(s) what
it will do with the gradient of step s until the end; both follow from beta1 and the two step counts alone. If the g(s)
are independent, with mean zero and the mean square that was seen, the drift at the end is normal around a known mean,
and the probability that it lies beyond one of the two middles is what weights are ranked by. No constant is fitted.

Gradients far below eps move nothing, such as those of tokens that never occur. Weight decay and a trend in the
gradients are left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.errors import MaskError
from subnet_ft.masks.fine_selection import ScorePieces, highest_overall
from subnet_ft.masks.mask import SubnetMask
from subnet_ft.masks.moments import Moments, check_moments
from subnet_ft.masks.provenance import COMPARE_DTYPES, Provenance
from subnet_ft.masks.record import record_base
from subnet_ft.masks.selection import tiles

logger = logging.getLogger(__name__)


def forecast_mask(
    checkpoint: str | Path | Checkpoint,
    moments: Iterable[tuple[str, Moments]],
    *,
    total_steps: int,
    density: float | None = None,
    recall: float | None = None,
    learning_rate: float | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> SubnetMask:
    """Choose the weights that are most likely to have changed at the end of a run, by one threshold for the model.

    Memory is bounded by the mask and a few times the largest tensor. The source of the mask has `expected_density`, of
    the final mask, and `expected_recall`, the share of it that is covered, both as far as the assumptions above hold.

    Args:
        checkpoint: The base.
        moments: Name and moments of every tensor that took a step, such as `subnet_ft.training.moments.read_moments`
            gives; iterated over several times. A tensor that it lacks got no gradient, and no trainable weight.
        total_steps: Steps of the whole run, those taken included.
        density: Share of the weights to choose, in (0, 1].
        recall: Instead: choose as few as are expected to cover this share of the final mask, in (0, 1). With neither,
            as many as are expected to change.
        learning_rate: Root mean square of the learning rate of the steps to come, > 0; `None`: that of the next step.
        dtype: The dtype in which the weights are trained, where they are stored in another one.
        seed: Decides which of equal weights are taken.

    Raises:
        MaskError: An argument is out of range, or the moments have no masters.
        MaskMismatchError: The moments are not those of this model.
        CheckpointError: The checkpoint cannot be found or read.
    """
    if density is not None and recall is not None:
        raise MaskError(f"Give a `density` or a `recall`, not both; got {density!r} and {recall!r}.")
    if density is not None and not 0 < density <= 1:
        raise MaskError(f"`density` must be in (0, 1], got {density!r}.")
    if recall is not None and not 0 < recall < 1:
        raise MaskError(f"`recall` must be in (0, 1), got {recall!r}.")
    if learning_rate is not None and not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise MaskError(f"`learning_rate` must be > 0, got {learning_rate!r}.")
    if dtype is not None and dtype not in COMPARE_DTYPES:
        raise MaskError(f"`dtype` must be one of {', '.join(COMPARE_DTYPES)}, got {dtype!r}.")
    base = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    shapes = {name: tuple(spec.shape) for name, spec in base.specs.items()}
    step = check_moments(moments, shapes)
    if total_steps <= step:
        raise MaskError(f"`total_steps` must be above the {step} steps that were taken, got {total_steps}.")
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    source: dict[str, Any] = {"kind": "forecast", "step": step, "total_steps": total_steps, "seed": seed}
    options = {"density": density, "recall": recall, "learning_rate": learning_rate}
    source |= {name: value for name, value in options.items() if value is not None}

    def count(scores: np.ndarray, numbers: np.ndarray) -> int:
        covered = np.cumsum(scores.astype(np.float64) * numbers)
        expected = float(covered[-1])
        if density is not None:
            wanted = round(density * num_parameters)
        elif recall is not None:
            wanted = int(np.cumsum(numbers)[np.searchsorted(covered, recall * expected)])
        else:
            wanted = round(expected)
        reached = float(np.interp(wanted, np.cumsum(numbers), covered)) / max(expected, 1.0)
        source["expected_density"] = round(expected / num_parameters, 4)
        source["expected_recall"] = round(reached, 4)
        logger.info(
            "forecast: %.4g of the weights are expected to change; the %.4g chosen to cover %.3g of them",
            expected / num_parameters, wanted / num_parameters, reached,
        )  # fmt: skip
        return wanted

    pieces = partial(_pieces, base, moments, dtype, total_steps - step, learning_rate)
    tensors = highest_overall(pieces, shapes, count, seed=seed)
    return SubnetMask(tensors, Provenance(base=record_base(base, dtype=dtype), compare_dtype=dtype, source=source))


def change_probability(
    weight: torch.Tensor, moments: Moments, *, remaining: int, learning_rate: float | None = None
) -> torch.Tensor:
    """Return (n,) float32: how likely each stored weight is to have another value after the steps to come.

    Args:
        weight: (n,) weights of the base in the dtype of training.
        moments: Of these n weights.
        remaining: Steps to come, >= 1.
        learning_rate: Of those steps; `None`: `moments.lr`.

    Raises:
        MaskError: The moments have no masters.

    Example:
        A bfloat16 weight of 1.5 changes at a drift of 2**-8. With 16 steps of momentum-free Adam to come at a learning
        rate of 2**-10, its drift spreads by 2**-8, and the probability is that of a normal number beyond one standard
        deviation, 0.317; with a master at 1.5 + 2**-8 already, it is 0.5 + 0.023.
    """
    if moments.master is None:
        raise MaskError(
            "The moments come without float32 masters, so how far the weights have drifted is not known. Take the "
            "first steps with `subnet.optimizer.master: fp32` or `remainder`."
        )
    lr = moments.lr if learning_rate is None else learning_rate
    carry, spread = _effects(moments.beta1, moments.step, remaining)
    root = moments.mean_square().sqrt()
    scale = lr / (root + moments.eps)
    mean = moments.master - weight.float() - carry * scale * moments.exp_avg
    # A gradient of zero moves nothing, but divides zero by zero.
    deviation = (spread * scale * root).clamp_min(torch.finfo(torch.float32).tiny)
    infinity = torch.tensor(float("inf"), dtype=weight.dtype)
    up, down = ((torch.nextafter(weight, side).float() - weight.float()) / 2 for side in (infinity, -infinity))
    probability: torch.Tensor = torch.special.ndtr((mean - up) / deviation)
    return probability.add_(torch.special.ndtr((down - mean) / deviation))


def _effects(beta1: float, step: int, remaining: int) -> tuple[float, float]:
    """Return what momentum does with `exp_avg`, and the 2-norm of what it does with the gradient of each later step.

    Both count updates of one learning rate, for gradients of the size that the denominator has.
    """
    reach = 0.0  # of exp_avg at step s: the sum of beta1**(t - s) / (1 - beta1**t) over the steps t from s to the last
    squares = 0.0
    for s in range(step + remaining, step, -1):
        reach = 1 / (1 - beta1**s) + beta1 * reach
        squares += ((1 - beta1) * reach) ** 2
    return beta1 * reach, math.sqrt(squares)


def _pieces(
    base: Checkpoint,
    moments: Iterable[tuple[str, Moments]],
    dtype: str | None,
    remaining: int,
    learning_rate: float | None,
) -> ScorePieces:
    for name, found in moments:
        weight = base.tensor(name).view(-1)
        for tile in tiles(weight.numel()):
            piece = weight[tile] if dtype is None else weight[tile].to(getattr(torch, dtype))
            yield name, change_probability(piece, found.part(tile), remaining=remaining, learning_rate=learning_rate)
