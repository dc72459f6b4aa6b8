"""The mean of compact gradients over processes: one all-reduce of K values, where DDP reduces the N dense ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from subnet_ft.errors import GradientError
from subnet_ft.optim.binding import Binding
from subnet_ft.optim.processes import num_processes
from subnet_ft.optim.shards import is_sharded, local


@dataclass(frozen=True)
class Replica:
    """What `prepare_ddp` settled about a parameter.

    Args:
        group: The processes that hold the replicas; `None` for all.
        is_kept: DDP reduces its dense gradient, because it insists on one.
        forget: Makes DDP reduce the gradients of the whole model again, once it wraps it anew.
    """

    group: dist.ProcessGroup | None
    is_kept: bool
    forget: Callable[[], None] = lambda: None


_replicas: MutableMapping[torch.Tensor, Replica] = WeakIdKeyDictionary()


def mark(parameter: torch.nn.Parameter, replica: Replica) -> None:
    """Remember that DDP leaves a parameter alone, so that its optimizer reduces what it got."""
    _replicas[parameter] = replica


def unmark(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Undo `prepare_ddp` for the models of these parameters; what DDP has wrapped already stays as it is."""
    for parameter in parameters:
        replica = _replicas.pop(parameter, None)
        if replica is not None:
            parameter._ddp_ignored = False  # type: ignore[attr-defined]
            replica.forget()


def replica_of(parameter: torch.nn.Parameter) -> Replica | None:
    """Return what `prepare_ddp` settled about a parameter, if it did."""
    return _replicas.get(parameter)


class Reduction:
    """Takes the mean of compact gradients over the processes that hold replicas.

    All buffers of a device lie in one flat tensor, with a flag per tensor behind them that says whether a gradient
    arrived: an expert that saw no token in one process has one if it saw some in another.

    Args:
        binding: All parameters and their masks.
        group: The processes; `None` for all.
        kept: The parameter whose gradient DDP has reduced already.
    """

    def __init__(self, binding: Binding, group: dist.ProcessGroup | None, kept: torch.nn.Parameter) -> None:
        self._binding = binding
        self._group = group
        self.kept = kept
        self._flats: dict[torch.device, torch.Tensor] = {}
        self._buffers: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._order: dict[torch.device, list[torch.nn.Parameter]] = {}

    def buffers(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return a buffer (K,) float32 of every trained parameter; those of one device are one tensor."""
        trained = [parameter for parameter in self._binding.names if self._binding.is_trained(parameter)]
        devices = {parameter: local(parameter).device for parameter in trained}
        if set(devices.values()) != self._flats.keys():
            self.forget()
            for device in dict.fromkeys(devices.values()):
                here = [parameter for parameter in trained if devices[parameter] == device]
                counts = [self._binding.bit_mask(parameter).count for parameter in here]
                flat = torch.zeros(sum(counts) + len(here), dtype=torch.float32, device=device)
                self._flats[device] = flat
                self._order[device] = here
                *buffers, _ = torch.split(flat, [*counts, len(here)])
                self._buffers.update(zip(here, buffers, strict=True))
        return dict(self._buffers)

    def reduce(self, squares: Mapping[torch.nn.Parameter, torch.Tensor]) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Replace every buffer by its mean over the processes; they all call it, whatever they got.

        Args:
            squares: The sum of squares () of every gradient that arrived here. In.

        Returns:
            The sums of squares () float64 of the means, of every tensor of which a gradient arrived anywhere.
        """
        if num_processes(self._group) == 1:
            return dict(squares)
        self.buffers()
        for parameter, buffer in self._buffers.items():
            if parameter not in squares:
                buffer.zero_()  # an older step may have left something
        arrived: list[torch.nn.Parameter] = []
        for device, flat in self._flats.items():
            here = self._order[device]
            flat[-len(here) :] = torch.tensor([float(parameter in squares) for parameter in here])
            dist.all_reduce(flat, group=self._group)
            arrived += [p for p, flag in zip(here, flat[-len(here) :].tolist(), strict=True) if flag > 0]
        means = [self._buffers[parameter] for parameter in arrived]
        if means:
            torch._foreach_mul_(means, 1.0 / num_processes(self._group))
        norms = torch._foreach_norm(means, 2, dtype=torch.float64) if means else ()
        return {parameter: norm.square() for parameter, norm in zip(arrived, norms, strict=True)}

    def forget(self) -> None:
        """Free the buffers, because masks or devices changed."""
        self._flats.clear()
        self._buffers.clear()
        self._order.clear()


def reduction_of(binding: Binding) -> Reduction | None:
    """Return what takes the mean over processes, if `prepare_ddp` prepared all parameters."""
    replicas = {parameter: replica_of(parameter) for parameter in binding.names}
    kept = [p for p, replica in replicas.items() if replica is not None and replica.is_kept]
    if len(kept) != 1 or not all(replicas.values()):
        return None
    found = replicas[kept[0]]
    assert found is not None
    return Reduction(binding, found.group, kept[0])


def check_reduced(parameter: torch.nn.Parameter, name: str) -> None:
    """Refuse a gradient that other processes would have to be averaged with, and nobody does.

    Raises:
        GradientError: Several processes train together, and the parameter is whole in each.
    """
    if num_processes() == 1 or is_sharded(parameter):
        return
    raise GradientError(
        f"{num_processes()} processes train together, and `{name}` is whole in each of them. DDP reduces dense "
        "gradients only after the hooks that compact them: call `prepare_ddp(model)` before DDP wraps the model, so "
        "that the optimizer reduces the compact ones, or build the optimizer with `compact_grads=False`. Under FSDP2 "
        "call `fully_shard` on the whole model, last, and build the optimizer afterwards, or `rebind` it."
    )
