"""`VersionCounters`: what autograd knows of weights that others stand in for, and how it becomes what it was."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

_FIRST, _APART, _MARKS = 1 << 31, 1 << 8, 1 << 23
_serials = itertools.count()


class VersionCounters:
    """The version counters of weights, as they were.

    `mark` gives all of them a number that no other exchange gave, and that fewer than 256 writes after another one
    do not reach, so that a graph that saw weights on one side of any exchange is not gone back through on another.

    Args:
        weights: By name, views that share their counters; those made under `torch.inference_mode` have none.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        counted = {name: weight for name, weight in weights.items() if not weight.is_inference()}
        self._names, self._weights = list(counted), tuple(counted.values())
        self._before = tuple(weight._version for weight in self._weights)
        self._marked: int | None = None

    def mark(self) -> None:
        """Count the exchange, whether or not its kernel did."""
        # The counters have 32 bits; after some millions of exchanges numbers come again.
        marked = _FIRST + next(_serials) % _MARKS * _APART
        self._set((marked,) * len(self._weights))
        self._marked = marked

    def written(self) -> list[str]:
        """Return the names of the weights that torch wrote to since `mark`."""
        if self._marked is None:
            return []
        found = zip(self._names, self._weights, self._before, strict=True)
        return [name for name, weight, before in found if weight._version not in (self._marked, before)]

    def restore(self) -> None:
        """Set the counters back: the weights have their bits again."""
        self._set(self._before)

    def _set(self, versions: tuple[int, ...]) -> None:
        torch._C._autograd._unsafe_set_version_counter(self._weights, versions)
