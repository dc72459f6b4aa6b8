"""Compact gradients: what is left of a dense gradient as soon as autograd has it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

import subnet_kernels
from subnet_ft.errors import GradientError
from subnet_kernels import BitMask

# Which object takes a parameter's gradient; two of them would steal each other's.
_owners: MutableMapping[torch.Tensor, weakref.ref[CompactGradients]] = WeakIdKeyDictionary()


class CompactGradients:
    """The gradient on the mask of every trainable tensor, accumulated in float32 over micro-batches.

    Invariant: a tensor has a gradient here exactly if one arrived since `clear`; its buffer `(K,)` then holds the sum.
    Buffers stay allocated from one step to the next.

    Args:
        parameters: Name to parameter, also those in which nothing is trained.
        bit_mask: Returns a parameter's mask on its device.

    Raises:
        GradientError: Another masked optimizer that is still alive was built on one of the parameters.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        bit_mask: Callable[[torch.nn.Parameter], BitMask],
    ) -> None:
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._bit_mask = bit_mask
        self._buffers: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._squares: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._claim()

    def hook(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Compact every gradient of these as soon as autograd has accumulated it, and free the dense one."""
        # A hook lives as long as its parameter; it must not keep this object, and with it the state, alive.
        reference = weakref.ref(self)
        for parameter in parameters:
            register: Any = parameter.register_post_accumulate_grad_hook  # torch does not type it
            self._handles.append(register(_hook(reference)))

    def add(self, parameter: torch.nn.Parameter) -> None:
        """Add a parameter's dense gradient on the mask to its buffer and free the dense one."""
        if parameter.grad is None:
            return
        mask = self._bit_mask(parameter)
        grad = flat_grad(parameter, self._names[parameter])
        buffer = self._buffers.get(parameter)
        if buffer is None or buffer.device != grad.device:
            buffer = self._buffers[parameter] = torch.empty(mask.count, dtype=torch.float32, device=grad.device)
            self._squares.pop(parameter, None)
        # What an earlier micro-batch left counts; what an earlier step left does not.
        self._squares[parameter] = subnet_kernels.compact(grad, mask, buffer, accumulate=parameter in self._squares)
        parameter.grad = None

    def collect(self) -> None:
        """Compact what stands in `.grad`, such as a gradient that was set by hand."""
        for parameter in self._names:
            self.add(parameter)

    def get(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Return a parameter's gradient (K,) float32, or `None` if none arrived since `clear`."""
        return self._buffers[parameter] if parameter in self._squares else None

    def norm(self) -> torch.Tensor:
        """Return the 2-norm () float32 of all gradients together."""
        return norm_of_squares(self._squares.values())

    def clear(self) -> None:
        """Forget every gradient; the buffers stay."""
        self._squares.clear()

    def release(self) -> None:
        """Remove the hooks and free the buffers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._buffers.clear()
        self._squares.clear()
        for parameter in self._names:
            if _owner(parameter) is self:
                del _owners[parameter]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _claim(self) -> None:
        if any(_owner(parameter) is not None for parameter in self._names):
            gc.collect()  # an optimizer that nobody holds any more may wait in a cycle
        taken = [name for parameter, name in self._names.items() if _owner(parameter) is not None]
        if taken:
            raise GradientError(
                f"`{taken[0]}` and {len(taken) - 1} other parameters already belong to another masked optimizer, and "
                "two would take each other's gradients. Call its `release()` first."
            )
        for parameter in self._names:
            _owners[parameter] = weakref.ref(self)


def flat_grad(parameter: torch.nn.Parameter, name: str) -> torch.Tensor:
    """Return a parameter's dense gradient as (N,), contiguous."""
    grad = parameter.grad
    assert grad is not None
    if grad.is_sparse:
        raise GradientError(f"`{name}` has a sparse gradient; build its embedding with sparse=False.")
    return grad.detach().reshape(-1).contiguous()


def norm_of_squares(squares: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the square root () float32 of the sum of () tensors, without waiting for their device."""
    found = list(squares)
    if not found:
        return torch.tensor(0.0)
    return torch.stack([square.to(found[0].device) for square in found]).sum().sqrt().to(torch.float32)


def _hook(reference: weakref.ref[CompactGradients]) -> Callable[[torch.Tensor], None]:
    def compact(parameter: torch.Tensor) -> None:
        owner = reference()
        if owner is not None:
            refuse_many_processes()
            assert isinstance(parameter, torch.nn.Parameter)
            with torch.no_grad():
                owner.add(parameter)

    return compact


def _owner(parameter: torch.nn.Parameter) -> CompactGradients | None:
    reference = _owners.get(parameter)
    owner: CompactGradients | None = None if reference is None else reference()
    return owner


def refuse_many_processes() -> None:
    """Raise GradientError where processes train together: DDP reduces dense gradients after the hooks have run."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise GradientError(
            f"{dist.get_world_size()} processes train together, and DDP reduces dense gradients only after the hooks "
            "that compact them. Build the optimizer with `compact_grads=False`."
        )
