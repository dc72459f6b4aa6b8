"""`Piece`: values of a stretch of one weight tensor, which change places with those in it; and many of them at once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

import subnet_kernels
from subnet_ft.errors import SwapError
from subnet_ft.optim.shards import local
from subnet_kernels import BitMask
from subnet_kernels.dispatch import choose

_LENGTH = 1 << 20
"""Weights of a piece on the CPU: two of them, with masks and values, stay in the cache that its cores share."""

_CPU = torch.device("cpu")
_WORD = 8

T = TypeVar("T")


class Piece:
    """Values of a stretch of a parameter, or of the part of it that this process holds.

    Args:
        name: Of the parameter.
        parameter: N weights in any shape. In-out.
        num_held: N, or how many of them this process holds.
        start: Flat index of the first weight of the stretch, among those held.
        mask: K bits of the stretch.
        values: (K,) in the parameter's dtype; they are copied. In.
    """

    def __init__(
        self,
        name: str,
        parameter: torch.nn.Parameter,
        num_held: int,
        start: int,
        mask: BitMask,
        values: torch.Tensor,
    ) -> None:
        self.name, self.parameter, self.start, self.mask = name, parameter, start, mask
        self.inside = False
        # Whether what came out again is what went in; `None` where nobody has looked.
        self.is_intact: bool | None = True
        self._num_held = num_held
        # In whole words: their fingerprint takes a fraction of the time that the values' own would.
        room = -(-values.nbytes // _WORD) * _WORD // values.element_size()
        self._words = torch.zeros(room, dtype=values.dtype, device=mask.device).view(torch.int64)
        self.values = self._words.view(values.dtype)[: values.numel()]
        self.values.copy_(values)
        self._own = subnet_kernels.fingerprint(self._words)
        self._is_unsure = False

    @property
    def is_ready(self) -> bool:
        """Whether the values that were given are held here, all of them."""
        return not self.inside and self.is_intact is True

    def weights(self) -> torch.Tensor:
        """Return the stretch, flat; raise SwapError unless it is where it was, in the dtype that it had."""
        held = local(self.parameter)
        mask, dtype = self.mask, self.values.dtype
        if (
            held.dtype != dtype
            or held.device != mask.device
            or held.numel() != self._num_held
            or not held.is_contiguous()
        ):
            raise SwapError(
                f"`{self.name}` is {held.dtype} on {held.device} with {held.numel():,} weights, and its values are "
                f"{dtype} on {mask.device} for {self._num_held:,}; both must be contiguous. Cast and move the model "
                "before values are prepared for it, or after they are out."
            )
        flat = held.view(-1)
        whole = mask.num_elements == self._num_held
        return flat if whole else flat[self.start : self.start + mask.num_elements]

    def bring_in(self) -> None:
        """Exchange values and weights unless the values are in."""
        self._bring(inside=True)

    def bring_out(self) -> None:
        """Exchange values and weights unless the values are out, and see whether they came back as they went."""
        self._bring(inside=False)
        if self.is_intact is None:
            self.is_intact = self._is_whole()

    def _bring(self, *, inside: bool) -> None:
        """Exchange unless that is done; it can be tried again after an interrupt."""
        if self._is_unsure:
            # Equal values are on both sides.
            self.inside, self._is_unsure = not self._is_whole(), False
        if self.inside is inside:
            return
        weights = self.weights()
        self.is_intact = None
        self._is_unsure = True
        subnet_kernels.swap(weights, self.mask, self.values)
        self.inside = inside
        self._is_unsure = False

    def _is_whole(self) -> bool:
        """Whether the values held are those that were given."""
        return subnet_kernels.fingerprint(self._words) == self._own


def pieces_of(name: str, parameter: torch.nn.Parameter, mask: BitMask, values: torch.Tensor) -> Iterator[Piece]:
    """Yield the pieces of one tensor, those without values left out.

    On the CPU large tensors are cut, so that threads share the work evenly and an exchange is done by one of them.

    Args:
        name: Of the parameter.
        parameter: N weights in any shape, of which this process holds those of the mask. In-out.
        mask: K bits of what this process holds.
        values: (K,) in the parameter's dtype; they are copied. In.
    """
    num_held = mask.num_elements
    if mask.device != _CPU or num_held <= _LENGTH:
        if mask.count:
            yield Piece(name, parameter, num_held, 0, mask, values)
        return
    used = 0
    for start in range(0, num_held, _LENGTH):
        length = min(_LENGTH, num_held - start)
        cut = BitMask.from_bits(mask.bits[start // 8 : (start + length + 7) // 8], length)
        if cut.count:
            yield Piece(name, parameter, num_held, start, cut, values[used : used + cut.count])
        used += cut.count


def check_apart(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise SwapError if two tensors have a weight in common, which each would take for its own."""
    places = sorted((held.data_ptr(), held.data_ptr() + held.nbytes, name) for name, held in weights.items())
    for (_, end, name), (start, _, following) in itertools.pairwise(places):
        if start < end:
            raise SwapError(
                f"`{name}` and `{following}` share memory, so a value of one would be a value of the other, too. Tie "
                "them by one parameter (`model.tie_weights()`), or give each its own memory (`.clone()`)."
            )


def side_by_side(action: Callable[[T], None], items: Sequence[T], devices: set[torch.device]) -> None:
    """Do something with every item; on the CPU as many threads as torch uses take one after the other.

    What one raises is raised when all threads have ended; the others go on.
    """
    queue = iter(items)

    def work() -> None:
        for item in queue:
            action(item)

    if devices == {_CPU} and choose("swap", _CPU).backend == "cpu":
        from subnet_kernels.cpu.threads import num_threads, run

        run(work, [()] * min(num_threads(), os.cpu_count() or 1))
    else:
        work()
