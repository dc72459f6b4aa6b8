"""`HotSwap`: many deltas of one base, of which any one is in the model at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator

import torch

from subnet_ft.checkpoints.listing import listing
from subnet_ft.deltas.applied import check_weights, parameters_of, swap_of
from subnet_ft.deltas.delta import Delta
from subnet_ft.deltas.swap import WeightSwap, reshard
from subnet_ft.errors import DeltaMismatchError, SwapError
from subnet_ft.masks import ModelRecord
from subnet_ft.optim.shards import local

_Marks = dict[str, tuple[int, int]]
"""Address and version counter of the weights, by name."""


class HotSwap:
    """Deltas of one base by name, switched like adapters: a switch is one pass over the weights that change.

    Invariant: the model is the base, or the base with the one delta that `active` names, bit for bit; the base, after a
    switch that fails. Beside the model it holds the values and the mask of every delta; those of the base that are not
    in the model take the place of the active delta's. Threads switch one after the other; none may compute meanwhile.

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
        self._seen: _Marks = {}
        self._lock = threading.RLock()

    @property
    def names(self) -> list[str]:
        """The names of the deltas, in the order in which they came."""
        return list(self._swaps)

    @property
    def active(self) -> str | None:
        """The name of the delta in the model; `None`: the model is the base."""
        with self._lock:
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
        with self._lock:
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
        with self._lock:
            if self._find(name).is_in:
                self.deactivate()
            del self._swaps[name]

    def activate(self, name: str) -> None:
        """Make the model the base with this delta, whatever it was before.

        Raises:
            SwapError: There is none of that name, something else is in the model, or somebody wrote to its weights.
            DeltaMismatchError: The weights are not those of the base any more.
        """
        with self._lock:
            swap, active = self._find(name), self.active
            if name == active:
                return
            if active is not None:
                before = self._swaps[active]
                if before.is_untouched and not self._written(without=before.names):
                    swap.take_the_place_of(before)
                    return
            self.deactivate()
            self._check_unwritten()
            swap.put_in()

    def deactivate(self) -> None:
        """Make the model the base.

        Raises:
            SwapError: Somebody wrote to the weights of the delta that was in the model.
        """
        with self._lock:
            active = self.active
            if active is not None:
                self._swaps[active].take_out()

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Inside, this delta is active, or none; afterwards, the one that was before."""
        before = self.active
        try:
            self._switch(name)
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
        written = self._written()
        if written:
            check_weights(self._parameters, self._base, written)
            self._seen = _marks(self._parameters)

    def _written(self, without: Collection[str] = ()) -> list[str]:
        """Return the names of the weights that torch wrote to, or that have another storage.

        Args:
            without: Those that an active delta changes, which look written to; of them, only the storage counts.
        """
        found = _marks(self._parameters)
        return [
            name
            for name, (storage, version) in self._seen.items()
            if found[name][0] != storage or (found[name][1] != version and name not in without)
        ]


def _marks(parameters: dict[str, torch.nn.Parameter]) -> _Marks:
    """Return numbers that change when torch writes to a weight or gives it another storage."""
    held = {name: local(parameter) for name, parameter in parameters.items()}
    return {name: (w.data_ptr(), -1 if w.is_inference() else w._version) for name, w in held.items()}
