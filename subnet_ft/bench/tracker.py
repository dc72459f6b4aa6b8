"""Every tensor storage that torch allocates in a block of code, with its size, its owner and how long it lived."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type its start
    """Counts the bytes of storages by owner, from the dispatch of the op that allocated them until they are freed.

    Only what has an owner counts. `peak` is the largest sum over all owners at one time, `at_peak` its parts, and
    `highest` the largest that each owner held at any time.

    Args:
        owner_of: Takes the op's name and an output of it; returns the owner, or `None` for a storage that is not to be
            counted.
    """

    def __init__(self, owner_of: Callable[[str, torch.Tensor], str | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner_of = owner_of
        self._known: set[int] = set()
        self.live: dict[str, int] = {}
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.highest: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the op and look at what it returned."""
        kwargs = kwargs or {}
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _address(leaf) not in given:
                self._add(str(func), leaf)
        return result

    def _add(self, op: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        owner = self._owner_of(op, tensor)
        if owner is None or key in self._known or size == 0:
            return
        self._known.add(key)
        self.live[owner] = self.live.get(owner, 0) + size
        self.highest[owner] = max(self.highest.get(owner, 0), self.live[owner])
        total = sum(self.live.values())
        if total > self.peak:
            self.peak, self.at_peak = total, {name: held for name, held in self.live.items() if held}
        weakref.finalize(storage, self._remove, key, owner, size)

    def _remove(self, key: int, owner: str, size: int) -> None:
        self._known.discard(key)
        self.live[owner] -= size


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
