"""Dense gradients, where something else must see `.grad`, such as DDP."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

import subnet_kernels
from subnet_ft.optim.clipping import sum_of_squares
from subnet_ft.optim.gradients import flat_grad
from subnet_ft.optim.owners import claim, disclaim
from subnet_kernels import BitMask


class _Square(NamedTuple):
    """The sum of squares () of a gradient, good as long as torch has not written to it."""

    grad: weakref.ref[torch.Tensor]
    version: int
    value: torch.Tensor


class DenseGradients:
    """What stands in `.grad`, read on the mask only; the twin of `CompactGradients`.

    Args:
        parameters: Name to parameter, also those in which nothing is trained.
        trained: Returns a parameter's mask on its device, `None` where nothing is trained.

    Raises:
        GradientError: Another masked optimizer that is still alive was built on one of the parameters.
    """

    nbytes = 0
    """Bytes of buffers of its own."""

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        trained: Callable[[torch.nn.Parameter], BitMask | None],
    ) -> None:
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._trained = trained
        # A sum of squares is one pass over a gradient, so it is kept until that gradient changes.
        self._squares: dict[torch.nn.Parameter, _Square] = {}
        claim(parameters, self)

    def hook(self) -> None:
        """Nothing to hook: autograd leaves the gradients where they are read."""

    def collect(self) -> None:
        """Nothing to collect: what was set by hand is read like the rest."""

    def buffers(self) -> list[torch.Tensor]:
        """Return what it holds from one step to the next: nothing."""
        return []

    def get(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Return a parameter's gradient (N,), or `None` if it has none."""
        return None if parameter.grad is None else flat_grad(parameter, self._names[parameter])

    def squares(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the sum of squares () on the mask of every gradient."""
        found: dict[torch.nn.Parameter, torch.Tensor] = {}
        for parameter in self._names:
            grad = parameter.grad
            mask = None if grad is None else self._trained(parameter)
            if grad is None or mask is None:
                continue
            known = self._squares.get(parameter)
            if known is None or known.grad() is not grad or known.version != grad._version:
                known = _Square(weakref.ref(grad), grad._version, self._square(parameter, mask))
                self._squares[parameter] = known
            found[parameter] = known.value
        return found

    def full_squares(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the sum of squares () of every whole gradient."""
        return {p: sum_of_squares(flat_grad(p, name)) for p, name in self._names.items() if p.grad is not None}

    def clear(self) -> None:
        """Forget what was measured, and drop the gradients in which nothing is trained: no step would."""
        self._squares.clear()
        for parameter in self._names:
            if parameter.grad is not None and self._trained(parameter) is None:
                parameter.grad = None

    def forget_masks(self) -> None:
        """Forget what was measured, because the masks changed."""
        self.clear()

    def release(self) -> None:
        """Let another optimizer have the parameters."""
        self.clear()
        disclaim(self._names, self)

    def _square(self, parameter: torch.nn.Parameter, mask: BitMask) -> torch.Tensor:
        grad = flat_grad(parameter, self._names[parameter])
        scratch = torch.empty(mask.count, dtype=torch.float32, device=grad.device)
        return subnet_kernels.compact(grad, mask, scratch, accumulate=False)
