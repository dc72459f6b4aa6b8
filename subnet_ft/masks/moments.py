"""What the first steps of a full run tell about every weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from subnet_ft.checkpoints.listing import listing
from subnet_ft.errors import MaskError, MaskMismatchError


@dataclass(frozen=True)
class Moments:
    """AdamW's state of one tensor after some steps of a full run, in C order of the tensor.

    Args:
        exp_avg: (N,) float32, running mean of the gradient, as the optimizer keeps it.
        exp_avg_sq: (N,) float32, running mean of the squared gradient, as the optimizer keeps it.
        master: (N,) float32, the weights before rounding; `None` where the run kept no masters.
        step: How many steps the tensor took, >= 1.
        beta1: Decay rate of `exp_avg`, in [0, 1).
        beta2: Decay rate of `exp_avg_sq`, in [0, 1).
        eps: Added to the denominator, > 0.
        lr: Learning rate of the step to come.
    """

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    master: torch.Tensor | None
    step: int
    beta1: float
    beta2: float
    eps: float
    lr: float

    def mean_gradient(self) -> torch.Tensor:
        """Return (N,) float32: the mean of the gradient, corrected for its start at zero."""
        return self.exp_avg / (1 - self.beta1**self.step)

    def mean_square(self) -> torch.Tensor:
        """Return (N,) float32: the mean of the squared gradient, corrected for its start at zero."""
        return self.exp_avg_sq / (1 - self.beta2**self.step)

    def part(self, where: slice) -> Moments:
        """Return the moments of some of the weights."""
        master = None if self.master is None else self.master[where]
        return replace(self, exp_avg=self.exp_avg[where], exp_avg_sq=self.exp_avg_sq[where], master=master)


def check_moments(moments: Iterable[tuple[str, Moments]], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Check that moments are those of a model; returns how many steps were taken.

    Args:
        moments: Name and moments of tensors of the model; iterated over once.
        shapes: Shape of every tensor of the model.

    Raises:
        MaskError: There are none, one is not finite, no tensor took a step, or they can be iterated over only once.
        MaskMismatchError: A tensor is not the model's, or has another number of weights.
    """
    if iter(moments) is moments:
        raise MaskError(
            "`moments` can be iterated over only once, and they are read several times: pass what `read_moments` "
            "returns, or a list."
        )
    step = 0
    for name, found in moments:
        if name not in shapes:
            raise MaskMismatchError(
                f"The moments are of another model: the checkpoint has no `{name}`, but {listing(list(shapes))}. Pass "
                "the base that the run started from."
            )
        if found.exp_avg.shape != (math.prod(shapes[name]),):
            raise MaskMismatchError(
                f"The moments of `{name}` are {tuple(found.exp_avg.shape)}, the checkpoint's tensor is {shapes[name]}. "
                "Pass the base that the run started from."
            )
        for values in (found.exp_avg, found.exp_avg_sq, found.master):
            if values is not None and not values.isfinite().all():
                raise MaskError(
                    f"The moments of `{name}` are not finite: the run had NaN or infinite gradients. Take the first "
                    "steps again with `subnet.optimizer.nonfinite: raise`, which tells where."
                )
        step = max(step, found.step)
    if step < 1:
        raise MaskError("The moments hold no tensor that took a step. Take at least one step of the full run first.")
    return step
