"""`WeightSwap`: other values of some of a model's weights, held compactly beside it and exchanged with those inside."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from subnet_ft.checkpoints.listing import listing
from subnet_ft.deltas.counters import VersionCounters
from subnet_ft.deltas.pieces import Piece, check_apart, pieces_of, side_by_side
from subnet_ft.errors import DeltaError, SwapError
from subnet_ft.masks import SubnetMask, TensorMask
from subnet_ft.masks.slices import count_before
from subnet_ft.optim.shards import local, part_mask, part_of
from subnet_kernels import BitMask

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule

_TRIES = 3
"""How often it is tried to bring values out, where signals interrupt it."""


class _Occupant:
    """Whose values are in a model.

    Args:
        name: What they are, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name


# What is in a model now, by parameter; nothing else may enter, so that no two are undone in the wrong order.
_inside: MutableMapping[torch.Tensor, _Occupant] = WeakIdKeyDictionary()
# A collected block may leave its model while this thread enters another.
_lock = threading.RLock()


class WeightSwap:
    """Values of the weights under a mask, which change places with those of the model; twice is nothing, bit for bit.

    Invariant: every value is either in the model or held here, also after an exception or an interrupt while they
    change places. While these are in the model nothing else can enter it, from this thread or another. Until they are
    out again the version counters of the weights say that they were written, so that autograd refuses a backward pass
    whose forward pass saw other weights; afterwards the counters are what they were, and so is what a pass may do.

    Where FSDP2 shards the model, each process holds the values of its part, and all of them swap at the same time.

    Args:
        model: Whose weights change. In-out.
        parameters: All of its parameters, by the names of the mask.
        mask: Which weights; its names and shapes are those of `parameters`.
        values: Returns the (K,) values of a whole tensor by its name, in the parameter's dtype; they are copied.
        name: What the values are, for messages.

    Raises:
        DeltaError: Values are missing, or have another dtype.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Mapping[str, torch.nn.Parameter],
        mask: SubnetMask,
        values: Callable[[str], torch.Tensor],
        *,
        name: str,
    ) -> None:
        self.name = name
        self._model = model
        self._parameters = dict(parameters)
        self._pieces: dict[tuple[str, int], Piece] = {}
        for tensor, parameter in parameters.items():
            if mask.tensors[tensor].count:
                bits, start = _mask_of(tensor, parameter, mask.tensors[tensor])
                given = values(tensor)[start : start + bits.count]
                if given.numel() != bits.count or given.dtype != parameter.dtype:
                    raise DeltaError(
                        f"{name} has {given.numel():,} values of {given.dtype} for the {bits.count:,} weights of "
                        f"`{tensor}` that its bits set, which are {parameter.dtype}."
                    )
                for piece in pieces_of(tensor, parameter, bits, given):
                    self._pieces[tensor, piece.start] = piece
        self._devices = {piece.mask.device for piece in self._pieces.values()}
        self._occupant: _Occupant | None = None
        self._counters: VersionCounters | None = None

    @property
    def is_in(self) -> bool:
        """Whether the values are in the model."""
        return self._occupant is not None

    @property
    def is_untouched(self) -> bool:
        """Whether they are in the model, and torch says that nobody wrote to their tensors since."""
        return self._counters is not None and not self._counters.written()

    @property
    def names(self) -> set[str]:
        """Of the tensors that change."""
        return {name for name, _ in self._pieces}

    @property
    def values_nbytes(self) -> int:
        """Bytes of the values."""
        return sum(piece.values.nbytes for piece in self._pieces.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the values, and of the masks that say where they belong."""
        return self.values_nbytes + sum(piece.mask.nbytes for piece in self._pieces.values())

    def put_in(self) -> None:
        """Give the model the values, and keep those that it had.

        Raises:
            SwapError: Values are in the model already, these or others, a weight was cast, moved or replaced, or the
                values were lost in the model before.
        """
        occupant = _Occupant(self.name)
        try:
            self._enter(occupant)
            self._check_place()
            self._counters = VersionCounters(self._weights())
            side_by_side(Piece.bring_in, list(self._pieces.values()), self._devices)
            self._counters.mark()
            torch.clear_autocast_cache()  # of copies in another dtype, which autocast would go on using
        except BaseException:
            if self._occupant is occupant:
                _surely(self._undo)
            raise

    def take_the_place_of(self, other: WeightSwap) -> None:
        """Give the model these values instead of those of `other`, which are in it: one pass over its weights.

        Whatever goes wrong, neither is in the model afterwards.

        Args:
            other: Values for the same parameters of the same model. In-out.

        Raises:
            SwapError: Somebody wrote to the weights of `other`, or what `put_in` says.
        """
        if not other.is_untouched or other._replaced():
            other.take_out()
        if other._occupant is None:
            self.put_in()
            return

        def exchange(key: tuple[str, int]) -> None:
            if key in other._pieces:
                other._pieces[key].bring_out()
            if key in self._pieces:
                self._pieces[key].bring_in()

        try:
            self._check_place()
            self._occupant = other._occupant
            assert other._counters is not None
            other._counters.restore()
            self._counters = VersionCounters(self._weights())
            side_by_side(exchange, list({**other._pieces, **self._pieces}), self._devices | other._devices)
            changed = other._changed()
            if changed:
                raise _written_error(other.name, changed)
            self._counters.mark()
            torch.clear_autocast_cache()
            self._occupant.name = self.name
            other._counters = other._occupant = None
        except BaseException:
            if other._occupant is not None:
                _surely(lambda: self._undo_instead_of(other))
            raise

    def take_out(self) -> None:
        """Give the model back the values that it had, and keep these; nothing happens where they are not in it.

        Raises:
            SwapError: Somebody wrote to the weights, cast, moved or replaced them in between. Whatever can be put back,
                is.
        """
        _surely(self._take_out)

    def _take_out(self) -> None:
        if self._occupant is None:
            return
        reshard(self._model)
        written = [] if self._counters is None else self._counters.written()
        failed = self._bring_out()
        written += self._replaced()
        changed = self._changed()
        if self._counters is not None and not (written or failed or changed):
            self._counters.restore()
        self._counters = None
        torch.clear_autocast_cache()
        self._leave()
        if failed:
            raise SwapError(f"{failed[0]} {self.name} is still in it there: load the model again.")
        if written or changed:
            raise _written_error(self.name, [*changed, *written])

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, the values are in the model; afterwards, it is what it was."""
        if self._occupant is not None:
            raise SwapError(f"{self.name} is in the model already. Leave the block that applies it first.")
        try:
            self.put_in()
            yield
            self.take_out()
        except BaseException:
            # What went wrong inside is what the caller has to know.
            with contextlib.suppress(SwapError):
                self.take_out()
            raise

    def _undo(self) -> None:
        """Bring out what is in, after an error while values changed places."""
        failed = self._bring_out()
        if self._counters is not None and not failed:
            self._counters.restore()
        self._counters = None
        self._leave()

    def _undo_instead_of(self, other: WeightSwap) -> None:
        """Bring out what is in of these and of `other`, after an error while they changed places."""
        self._bring_out()
        if self._counters is not None:
            self._counters.restore()
        self._counters = self._occupant = None
        other._undo()

    def _bring_out(self) -> list[SwapError]:
        """Exchange what is in; return what kept pieces from it."""
        with contextlib.suppress(SwapError):  # the same one comes again
            side_by_side(Piece.bring_out, list(self._pieces.values()), self._devices)
        failed = []
        for piece in self._pieces.values():
            try:
                piece.bring_out()
            except SwapError as error:
                failed.append(error)
        return failed

    def _changed(self) -> list[str]:
        """Return the names of the tensors whose values did not come out as they went in."""
        return list(dict.fromkeys(name for (name, _), piece in self._pieces.items() if piece.is_intact is False))

    def _check_place(self) -> None:
        """Raise SwapError unless these are the values that were given, and the weights those they were prepared for."""
        reshard(self._model)
        replaced = self._replaced()
        if replaced:
            raise SwapError(
                f"{len(replaced)} parameters of the model are not those that {self.name} was prepared for: "
                f"{listing(replaced)}. Somebody put others in their place (`load_state_dict(..., assign=True)`, "
                "`fully_shard`); prepare the values again, for the model as it is."
            )
        check_apart({name: local(parameter) for name, parameter in self._parameters.items()})
        for piece in self._pieces.values():
            piece.weights()
        lost = list(dict.fromkeys(name for (name, _), piece in self._pieces.items() if not piece.is_ready))
        if lost:
            raise SwapError(
                f"{self.name} lost its values of {len(lost)} tensors: {listing(lost)}. Somebody wrote to those, or "
                "cast or moved them, while the values were in the model. Prepare the values again; in a `HotSwap`, "
                "remove the delta and add it again."
            )

    def _replaced(self) -> list[str]:
        """Return the names of the parameters that are not in the model any more."""
        present = {id(parameter) for parameter in self._model.parameters()}
        return [name for name, parameter in self._parameters.items() if id(parameter) not in present]

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: local(self._parameters[name]) for name, _ in self._pieces}

    def _enter(self, occupant: _Occupant) -> None:
        with _lock:
            found = (_inside[parameter] for parameter in self._parameters.values() if parameter in _inside)
            taken = next(found, None)
            if taken is not None:
                raise SwapError(
                    f"{self.name} cannot enter the model, because {taken.name} is in it. One at a time: leave the "
                    "block that applies it, or deactivate it, and use a copy of the model where both are needed at "
                    "once."
                )
            self._occupant = occupant
            for parameter in self._parameters.values():
                _inside[parameter] = occupant

    def _leave(self) -> None:
        with _lock:
            for parameter in self._parameters.values():
                if self._occupant is not None and _inside.get(parameter) is self._occupant:
                    del _inside[parameter]
            self._occupant = None


def _surely(action: Callable[[], None]) -> None:
    """Do what can be done again; what interrupts it is raised when it is done."""
    interrupt: BaseException | None = None
    for _ in range(_TRIES):
        try:
            action()
            break
        except SwapError:
            raise
        except BaseException as error:
            interrupt = error
    try:
        if interrupt is not None:
            raise interrupt
    finally:
        del interrupt  # which holds this frame


def _written_error(name: str, tensors: list[str]) -> SwapError:
    names = list(dict.fromkeys(tensors))
    return SwapError(
        f"Somebody wrote to {len(names)} tensors while {name} was in the model: {listing(names)}. The weights under "
        "its mask are those from before again; what was written to others is still there. Load the model again, "
        "and take the values out before weights are trained or loaded."
    )


def _mask_of(name: str, parameter: torch.nn.Parameter, mask: TensorMask) -> tuple[BitMask, int]:
    """Return the mask of what this process holds of a parameter, and where its compact values start in the whole's."""
    part = part_of(name, parameter)
    start = 0 if part.group is None else count_before(mask.bits, part.start)
    return part_mask(mask.bits, part, local(parameter).device), start


def reshard(model: torch.nn.Module) -> None:
    """Free what FSDP2 has gathered of a model, so that it gathers the weights as they are when it needs them."""
    if dist.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
