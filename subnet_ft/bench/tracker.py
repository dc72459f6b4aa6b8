"""Every tensor storage that torch allocates in a block of code, with its size, its owner and how long it lived."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Peak:
    """The largest sum over all owners at one time, its parts, and the largest that each owner held at any time."""

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    highest: dict[str, int] = field(default_factory=dict)


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type its start
    """Counts the bytes of storages by owner, from the dispatch of the op that allocated them until they are freed.

    Only what has an owner counts, and only what was allocated inside the block: a view of something older never does.
    A storage without an owner gets another chance with every view of it.

    Args:
        owner_of: Takes the op's name and an output of it, whose storage is new or has no owner so far; returns the
            owner, or `None` for a storage that is not to be counted.
    """

    def __init__(self, owner_of: Callable[[str, torch.Tensor], str | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner_of = owner_of
        self._serials: dict[int, int] = {}  # of the storages that count, by their address while they live
        self._without_owner: set[int] = set()
        self._numbers = itertools.count()
        self._sections: list[list[tuple[int, str, int]]] = [[]]
        self.live: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the op and look at what it returned."""
        kwargs = kwargs or {}
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                address = _address(leaf)
                if address in self._without_owner or (address not in given and address not in self._serials):
                    self._look(str(func), leaf, address)
        return result

    def mark(self) -> None:
        """Begin another section, with a peak of its own; what lives now counts in both."""
        self._sections.append([])

    def peaks(self, *, without: Iterable[torch.Tensor] = ()) -> list[Peak]:
        """Return the peak of every section.

        Args:
            without: Tensors whose storages do not count after all, such as state that outlives the block.
        """
        left_out = {self._serials.get(_address(tensor)) for tensor in without}
        held: dict[str, int] = {}
        peaks = []
        for section in self._sections:
            kept = {owner: size for owner, size in held.items() if size}
            peak = Peak(sum(held.values()), kept, dict(kept))
            for serial, owner, change in section:
                if serial in left_out:
                    continue
                held[owner] = held.get(owner, 0) + change
                peak.highest[owner] = max(peak.highest.get(owner, 0), held[owner])
                if sum(held.values()) > peak.total:
                    peak.total, peak.parts = sum(held.values()), {name: size for name, size in held.items() if size}
            peaks.append(peak)
        return peaks

    def _look(self, op: str, tensor: torch.Tensor, address: int) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if size == 0:
            return
        owner = self._owner_of(op, tensor)
        if owner is not None:
            self._without_owner.discard(address)
            serial = self._serials[address] = next(self._numbers)
            self._change(serial, owner, size)
            weakref.finalize(storage, self._remove, address, serial, owner, size)
        elif address not in self._without_owner:
            self._without_owner.add(address)
            weakref.finalize(storage, self._without_owner.discard, address)

    def _remove(self, address: int, serial: int, owner: str, size: int) -> None:
        del self._serials[address]
        self._change(serial, owner, -size)

    def _change(self, serial: int, owner: str, change: int) -> None:
        self._sections[-1].append((serial, owner, change))
        self.live[owner] = self.live.get(owner, 0) + change


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
