"""Compact gradients: what is left of a dense gradient as soon as autograd has it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

import subnet_kernels
from subnet_ft.errors import GradientError
from subnet_ft.optim.clipping import sum_of_squares
from subnet_ft.optim.owners import claim, disclaim
from subnet_kernels import BitMask


class CompactGradients:
    """The gradient on the mask of every trainable tensor, accumulated in float32 over micro-batches.

    Invariant: a tensor has a gradient here exactly if one arrived since `clear`; its buffer `(K,)` then holds the sum.
    Buffers stay allocated from one step to the next.

    Args:
        parameters: Name to parameter, also those in which nothing is trained.
        trained: Returns a parameter's mask on its device, `None` where nothing is trained.
        measure_full: Also measure the whole gradient before it is gone. That of several backward passes together is
            never there to be measured, so each tensor may then get one gradient per step.

    Raises:
        GradientError: Another masked optimizer that is still alive was built on one of the parameters.
    """

    keeps_squares = True

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        trained: Callable[[torch.nn.Parameter], BitMask | None],
        *,
        measure_full: bool,
    ) -> None:
        refuse_many_processes()
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._trained = trained
        self._measure_full = measure_full
        self._buffers: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._squares: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._full_squares: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        claim(parameters, self)

    def hook(self) -> None:
        """Compact every gradient as soon as autograd has accumulated it, and free the dense one."""
        self._unhook()
        # A hook lives as long as its parameter; it must not keep this object, and with it the state, alive.
        reference = weakref.ref(self)
        for parameter in self._names:
            if parameter.requires_grad:
                register: Any = parameter.register_post_accumulate_grad_hook  # torch does not type it
                self._handles.append(register(_hook(reference)))

    def add(self, parameter: torch.nn.Parameter) -> None:
        """Add a parameter's dense gradient on the mask to its buffer and free the dense one."""
        if parameter.grad is None:
            return
        mask = self._trained(parameter)
        grad = flat_grad(parameter, self._names[parameter])
        if self._measure_full:
            if parameter in self._full_squares:
                raise GradientError(
                    f"`{self._names[parameter]}` got a second gradient before the step, and the norm of the whole "
                    "gradient needs their dense sum, which compaction never holds. Take one micro-batch per step, clip "
                    "on the masked norm, or build the optimizer with `compact_grads=False`."
                )
            self._full_squares[parameter] = sum_of_squares(grad)
        if mask is not None:
            buffer = self._buffers.get(parameter)
            if buffer is None or buffer.device != grad.device:
                if parameter in self._squares:
                    raise GradientError(
                        f"`{self._names[parameter]}` moved to {grad.device} between two micro-batches of one step. "
                        "Move the model between steps."
                    )
                buffer = self._buffers[parameter] = torch.empty(mask.count, dtype=torch.float32, device=grad.device)
            # What an earlier micro-batch left counts; what an earlier step left does not.
            self._squares[parameter] = subnet_kernels.compact(grad, mask, buffer, accumulate=parameter in self._squares)
        parameter.grad = None

    def collect(self) -> None:
        """Compact what stands in `.grad`, such as a gradient that was set by hand."""
        for parameter in self._names:
            self.add(parameter)

    def buffers(self) -> list[torch.Tensor]:
        """Return what it holds from one step to the next: a buffer (K,) float32 of every tensor that had a gradient."""
        return list(self._buffers.values())

    def get(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Return a parameter's gradient (K,) float32, or `None` if none arrived since `clear`."""
        return self._buffers[parameter] if parameter in self._squares else None

    def squares(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the sum of squares () on the mask of every gradient that arrived."""
        self.collect()
        return dict(self._squares)

    def full_squares(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the sum of squares () of every whole gradient that arrived; needs `measure_full`."""
        self.collect()
        return dict(self._full_squares)

    def clear(self) -> None:
        """Forget every gradient; the buffers stay."""
        self._squares.clear()
        self._full_squares.clear()
        for parameter in self._names:
            parameter.grad = None

    def forget_masks(self) -> None:
        """Free the buffers and hook again, because the masks or what requires a gradient changed."""
        self.clear()
        self._buffers.clear()
        self.hook()

    def release(self) -> None:
        """Remove the hooks and free the buffers."""
        self._unhook()
        self._buffers.clear()
        self.clear()
        disclaim(self._names, self)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def flat_grad(parameter: torch.nn.Parameter, name: str) -> torch.Tensor:
    """Return a parameter's dense gradient as (N,), contiguous."""
    grad = parameter.grad
    assert grad is not None
    if grad.is_sparse:
        raise GradientError(f"`{name}` has a sparse gradient; build its embedding with sparse=False.")
    return grad.detach().reshape(-1).contiguous()


def _hook(reference: weakref.ref[CompactGradients]) -> Callable[[torch.Tensor], None]:
    def compact(parameter: torch.Tensor) -> None:
        owner = reference()
        if owner is not None:
            refuse_many_processes()
            assert isinstance(parameter, torch.nn.Parameter)
            with torch.no_grad():
                owner.add(parameter)

    return compact


def num_processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def refuse_many_processes() -> None:
    """Raise GradientError where processes train together: DDP reduces dense gradients after the hooks have run."""
    if num_processes() > 1:
        raise GradientError(
            f"{num_processes()} processes train together, and DDP reduces dense gradients only after the hooks "
            "that compact them. Build the optimizer with `compact_grads=False`."
        )
