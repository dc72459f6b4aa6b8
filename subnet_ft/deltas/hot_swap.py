"""`HotSwap`: many deltas of one base, of which any one is in the model at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from subnet_ft.checkpoints.listing import listing
from subnet_ft.deltas.applied import check_weights, parameters_of, swap_of
from subnet_ft.deltas.delta import Delta
from subnet_ft.deltas.swap import WeightSwap, reshard
from subnet_ft.errors import DeltaMismatchError, SwapError
from subnet_ft.masks import ModelRecord
from subnet_ft.optim.shards import local


class HotSwap:
    """Deltas of one base by name, switched like adapters: a switch is two passes over the weights that change.

    Invariant: the model is the base, or the base with the one delta that `active` names, bit for bit. Beside the model
    it holds the values and the mask of every delta; those of the base that are not in the model take the place of the
    active delta's.

    The base is checked with the first delta: one pass over all weights. Later it is checked again only where torch says
    that somebody wrote to a weight.

    Args:
        model: The base. In-out.

    Example:
        `bank = HotSwap(model); bank.add("sums", delta); bank.activate("sums")`
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._swaps: dict[str, WeightSwap] = {}
        self._base: ModelRecord | None = None
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._seen: list[tuple[int, int]] = []

    @property
    def names(self) -> list[str]:
        """The names of the deltas, in the order in which they came."""
        return list(self._swaps)

    @property
    def active(self) -> str | None:
        """The name of the delta in the model; `None`: the model is the base."""
        return next((name for name, swap in self._swaps.items() if swap.is_in), None)

    @property
    def nbytes(self) -> int:
        """Bytes beside the model: values and masks."""
        return sum(swap.nbytes for swap in self._swaps.values())

    def add(self, name: str, delta: Delta) -> None:
        """Take a copy of a delta's values, ready to be activated; one that is active stays so.

        Raises:
            SwapError: There is a delta of that name.
            DeltaMismatchError: The model is not the base of the delta, or the delta has another base than the others.
        """
        if name in self._swaps:
            raise SwapError(f"There is a delta `{name}` already. Remove it first, or choose another name.")
        reshard(self._model)
        parameters = parameters_of(self._model, delta)
        if self._base is None:
            check_weights(parameters, delta.base, parameters)
            self._base, self._parameters, self._seen = delta.base, parameters, _marks(parameters)
        self._check_same_base(name, delta.base)
        self._swaps[name] = swap_of(self._model, delta, self._parameters, name=f"the delta `{name}`")

    def remove(self, name: str) -> None:
        """Forget a delta; one that is active is taken out first.

        Raises:
            SwapError: There is none of that name, or somebody wrote to the weights.
        """
        if self._find(name).is_in:
            self.deactivate()
        del self._swaps[name]

    def activate(self, name: str) -> None:
        """Make the model the base with this delta, whatever it was before.

        Raises:
            SwapError: There is none of that name, something else is in the model, or somebody wrote to its weights.
            DeltaMismatchError: The weights are not those of the base any more.
        """
        swap = self._find(name)
        if swap.is_in:
            return
        self.deactivate()
        self._check_unwritten()
        swap.put_in()

    def deactivate(self) -> None:
        """Make the model the base.

        Raises:
            SwapError: Somebody wrote to the weights of the delta that was in the model.
        """
        active = self.active
        if active is not None:
            self._swaps[active].take_out()

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Inside, this delta is active, or none; afterwards, the one that was before."""
        before = self.active
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str | None) -> None:
        if name is None:
            self.deactivate()
        else:
            self.activate(name)

    def _find(self, name: str) -> WeightSwap:
        if name not in self._swaps:
            raise SwapError(f"There is no delta `{name}`; there are {listing(self.names)}. Add it first.")
        return self._swaps[name]

    def _check_same_base(self, name: str, base: ModelRecord) -> None:
        assert self._base is not None
        if base.fingerprints != self._base.fingerprints:
            odd = next(n for n, found in self._base.fingerprints.items() if base.fingerprints.get(n) != found)
            raise DeltaMismatchError(
                f"The delta `{name}` was made for `{base.name}`, the others for `{self._base.name}`: `{odd}` has "
                f"fingerprint {base.fingerprints.get(odd)} there and {self._base.fingerprints[odd]} here. Only deltas "
                "of one base share a model."
            )

    def _check_unwritten(self) -> None:
        """Compare the weights with the base where torch says that somebody wrote to one."""
        assert self._base is not None
        seen = _marks(self._parameters)
        if seen != self._seen:
            names = [n for n, old, new in zip(self._parameters, self._seen, seen, strict=True) if old != new]
            check_weights(self._parameters, self._base, names)
            self._seen = seen


def _marks(parameters: dict[str, torch.nn.Parameter]) -> list[tuple[int, int]]:
    """Return numbers that change when torch writes to a weight or gives it another storage."""
    held = [local(parameter) for parameter in parameters.values()]
    return [(weight.data_ptr(), -1 if weight.is_inference() else weight._version) for weight in held]
