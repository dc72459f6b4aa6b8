"""Dense gradients, where something else must see `.grad`, such as DDP."""

from __future__ import annotations

import torch

import subnet_kernels
from subnet_ft.errors import GradientError
from subnet_ft.optim.binding import Binding
from subnet_ft.optim.clipping import sum_of_squares
from subnet_ft.optim.gradients import flat_grad
from subnet_ft.optim.owners import claim, disclaim
from subnet_ft.optim.processes import num_processes
from subnet_ft.optim.reduction import replica_of
from subnet_kernels import BitMask


class DenseGradients:
    """What stands in `.grad`, read on the mask only; the twin of `CompactGradients`.

    Args:
        binding: All parameters, also those in which nothing is trained, and their masks.
        measure_full: As in `CompactGradients`; here the whole gradient always stands.

    Raises:
        GradientError: Another masked optimizer that is still alive was built on one of the parameters, or DDP was told
            to leave their gradients alone.
    """

    keeps_squares = False
    nbytes = 0
    """Bytes of buffers of its own."""

    def __init__(self, binding: Binding, *, measure_full: bool) -> None:
        prepared = [name for parameter, name in binding.names.items() if replica_of(parameter) is not None]
        if prepared and num_processes() > 1:
            raise GradientError(
                f"`prepare_ddp` has told DDP to leave `{prepared[0]}` and {len(prepared) - 1} other gradients to an "
                "optimizer with compact ones, so nobody would reduce the dense ones. Call `release()` on that "
                "optimizer before DDP wraps the model again, or leave `compact_grads` on."
            )
        self._names = binding.names
        self._trained = binding.trained
        claim({name: parameter for parameter, name in binding.names.items()}, self)

    def hook(self) -> None:
        """Nothing to hook: autograd leaves the gradients where they are read."""

    @property
    def is_pending(self) -> bool:
        """Whether a gradient waits for a step: what stands in `.grad` is nobody's business but the caller's."""
        return False

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
        masks = {p: self._trained(p) for p in self._names if p.grad is not None}
        return {parameter: self._square(parameter, mask) for parameter, mask in masks.items() if mask is not None}

    def full_squares(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the sum of squares () of every whole gradient."""
        return {p: sum_of_squares(flat_grad(p, name)) for p, name in self._names.items() if p.grad is not None}

    def clear(self) -> None:
        """Drop the gradients in which nothing is trained: no step would."""
        for parameter in self._names:
            if parameter.grad is not None and self._trained(parameter) is None:
                parameter.grad = None

    def forget_masks(self) -> None:
        """Drop the gradients in which nothing is trained any more."""
        self.clear()

    def release(self) -> None:
        """Let another optimizer have the parameters."""
        self.clear()
        disclaim(self._names, self)

    def _square(self, parameter: torch.nn.Parameter, mask: BitMask) -> torch.Tensor:
        grad = flat_grad(parameter, self._names[parameter])
        scratch = torch.empty(mask.count, dtype=torch.float32, device=grad.device)
        return subnet_kernels.compact(grad, mask, scratch, accumulate=False)
