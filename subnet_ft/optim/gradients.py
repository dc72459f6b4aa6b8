"""Compact gradients: what is left of a dense gradient as soon as autograd has it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

import subnet_kernels
from subnet_ft.errors import GradientError
from subnet_ft.optim.binding import Binding
from subnet_ft.optim.clipping import sum_of_squares
from subnet_ft.optim.owners import claim, disclaim
from subnet_ft.optim.processes import num_processes
from subnet_ft.optim.reduction import Reduction, check_reduced, reduction_of, unmark
from subnet_ft.optim.shards import local
from subnet_kernels import BitMask


class CompactGradients:
    """The gradient on the mask of every trainable tensor, accumulated in float32 over micro-batches.

    Invariant: a tensor has a gradient here exactly if one arrived since `clear`; its buffer `(K,)` then holds the sum,
    and once several processes have shared what they have, the mean over them. Buffers stay allocated from one step to
    the next.

    Args:
        binding: All parameters, also those in which nothing is trained, and their masks.
        measure_full: Also measure the whole gradient before it is gone. That of several backward passes together is
            never there to be measured, so each tensor may then get one gradient per step, in one process.

    Raises:
        GradientError: Another masked optimizer that is still alive was built on one of the parameters, or the whole
            gradient of several processes is asked for.
    """

    keeps_squares = True

    def __init__(self, binding: Binding, *, measure_full: bool) -> None:
        self._binding = binding
        self._names = binding.names
        self._measure_full = measure_full
        self._reduction = self._shared()
        self._buffers: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._squares: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._full_squares: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._is_reduced = False
        claim({name: parameter for parameter, name in self._names.items()}, self)

    def hook(self) -> None:
        """Compact every gradient as soon as autograd has accumulated it, and free the dense one."""
        self._unhook()
        # A hook lives as long as its parameter; it must not keep this object, and with it the state, alive.
        reference = weakref.ref(self)
        for parameter in self._names:
            # DDP reduces the gradient of the tensor that it keeps after all hooks: it is taken before the step.
            if parameter.requires_grad and not (self._reduction and parameter is self._reduction.kept):
                register: Any = parameter.register_post_accumulate_grad_hook  # torch does not type it
                self._handles.append(register(_hook(reference)))

    def add(self, parameter: torch.nn.Parameter) -> None:
        """Add a parameter's dense gradient on the mask to its buffer and free the dense one."""
        if parameter.grad is None:
            return
        if self._reduction is None:
            check_reduced(parameter, self._names[parameter])
        mask = self._binding.trained(parameter)
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
            if self._is_reduced:
                raise GradientError(
                    f"`{self._names[parameter]}` got a gradient after the processes had shared those of this step. Ask "
                    "for norms, clip and step only after the last micro-batch; then call `zero_grad()`."
                )
            buffer = self._buffer(parameter, mask, grad.device)
            # What an earlier micro-batch left counts; what an earlier step left does not.
            self._squares[parameter] = subnet_kernels.compact(grad, mask, buffer, accumulate=parameter in self._squares)
        parameter.grad = None

    def collect(self) -> None:
        """Compact what stands in `.grad`, such as a gradient that was set by hand, and take the mean over processes.

        Processes that train together call it together.
        """
        for parameter in self._names:
            self.add(parameter)
        if self._reduction is not None and not self._is_reduced:
            self._squares = self._reduction.reduce(self._squares)
            self._is_reduced = bool(self._squares)
            if self._is_reduced:  # also where no gradient arrived in this process so far
                self._buffers = self._reduction.buffers()

    @property
    def is_pending(self) -> bool:
        """Whether a gradient arrived in this process that no step has taken."""
        return bool(self._squares) or any(p.grad is not None and self._binding.is_trained(p) for p in self._names)

    def buffers(self) -> list[torch.Tensor]:
        """Return what it holds from one step to the next: a buffer (K,) float32 of every tensor that had a gradient."""
        return list(self._buffers.values())

    def get(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Return a parameter's gradient (K,) float32, or `None` if none arrived since `clear`."""
        return self._buffers[parameter] if parameter in self._squares else None

    def squares(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the sum of squares () on the mask of every gradient that arrived; that of a part, where it is one."""
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
        self._is_reduced = False
        for parameter in self._names:
            parameter.grad = None

    def forget_masks(self) -> None:
        """Free the buffers and hook again, because the masks or what requires a gradient changed."""
        self.clear()
        self._buffers.clear()
        if self._reduction is not None:
            self._reduction.forget()
        self.hook()

    def release(self) -> None:
        """Remove the hooks and free the buffers."""
        self._unhook()
        self._buffers.clear()
        if self._reduction is not None:
            self._reduction.forget()
            unmark(self._names)
        self.clear()
        disclaim(self._names, self)

    def share(self) -> None:
        """Reduce gradients across processes from now on, if `prepare_ddp` has prepared all parameters."""
        self._reduction = self._shared()
        self.forget_masks()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _shared(self) -> Reduction | None:
        reduction = reduction_of(self._binding)
        if reduction is not None and self._measure_full and num_processes() > 1:
            raise GradientError(
                f"The norm of the whole gradient needs the dense gradients of all {num_processes()} processes, which "
                "compaction never holds. Clip on the masked norm, or build the optimizer with `compact_grads=False`."
            )
        return reduction

    def _buffer(self, parameter: torch.nn.Parameter, mask: BitMask, device: torch.device) -> torch.Tensor:
        buffer = self._buffers.get(parameter)
        if buffer is not None and buffer.device == device:
            return buffer
        if parameter in self._squares:
            raise GradientError(
                f"`{self._names[parameter]}` moved to {device} between two micro-batches of one step. Move the model "
                "between steps."
            )
        if self._reduction is not None:
            # What is reduced together lies together.
            self._buffers = self._reduction.buffers()
            return self._buffers[parameter]
        buffer = self._buffers[parameter] = torch.empty(mask.count, dtype=torch.float32, device=device)
        return buffer

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def flat_grad(parameter: torch.nn.Parameter, name: str) -> torch.Tensor:
    """Return what this process holds of a parameter's dense gradient, as (N,), contiguous."""
    grad = parameter.grad
    assert grad is not None
    if grad.is_sparse:
        raise GradientError(f"`{name}` has a sparse gradient; build its embedding with sparse=False.")
    return local(grad).reshape(-1).contiguous()


def _hook(reference: weakref.ref[CompactGradients]) -> Callable[[torch.Tensor], None]:
    def compact(parameter: torch.Tensor) -> None:
        owner = reference()
        if owner is not None:
            assert isinstance(parameter, torch.nn.Parameter)
            with torch.no_grad():
                owner.add(parameter)

    return compact
