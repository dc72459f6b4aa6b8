"""`WeightSwap`: other values of some of a model's weights, held compactly beside it and exchanged with those inside."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence

import torch
import torch.distributed as dist
from torch.autograd import _unsafe_preserve_version_counter  # type: ignore[attr-defined]  # its name says why
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakIdKeyDictionary

import subnet_kernels
from subnet_ft.checkpoints.listing import listing
from subnet_ft.errors import DeltaError, SwapError
from subnet_ft.masks import SubnetMask, TensorMask
from subnet_ft.masks.slices import count_before
from subnet_ft.optim.shards import local, local_flat, part_mask, part_of
from subnet_kernels import BitMask
from subnet_kernels.dispatch import choose

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule

# What is in a model now, by parameter; nothing else may enter, so that no two are undone in the wrong order.
_inside: MutableMapping[torch.Tensor, str] = WeakIdKeyDictionary()
_lock = threading.Lock()

_LARGE = 1 << 20
"""Weights from which on a kernel for the CPU divides one tensor among threads."""

_TRIES = 3
"""How often a tensor is tried that a signal interrupts."""


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
        self._parameters = list(parameters.values())
        self._parts = []
        for tensor, parameter in parameters.items():
            if mask.tensors[tensor].count:
                bits, start = _mask_of(tensor, parameter, mask.tensors[tensor])
                held = values(tensor)[start : start + bits.count].to(bits.device, copy=True)
                if held.numel() != bits.count or held.dtype != parameter.dtype:
                    raise DeltaError(
                        f"{name} has {held.numel():,} values of {held.dtype} for the {bits.count:,} weights of "
                        f"`{tensor}` that its bits set, which are {parameter.dtype}."
                    )
                self._parts.append(_Part(tensor, parameter, bits, held))
        self._counters: _Counters | None = None

    @property
    def is_in(self) -> bool:
        """Whether the values are in the model."""
        return self._counters is not None

    @property
    def values_nbytes(self) -> int:
        """Bytes of the values."""
        return sum(part.values.nbytes for part in self._parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the values, and of the masks that say where they belong."""
        return self.values_nbytes + sum(part.mask.nbytes for part in self._parts)

    def put_in(self) -> None:
        """Give the model the values, and keep those that it had.

        Raises:
            SwapError: Values are in the model already, these or others, or a weight was cast or moved.
        """
        self._enter()
        try:
            reshard(self._model)
            for part in self._parts:
                part.check()
            counters = _Counters([local(part.parameter) for part in self._parts])
            try:
                self._side_by_side(lambda part: part.bring(inside=True))
                counters.mark()
            except BaseException:
                self._bring_out()
                counters.restore()
                raise
        except BaseException:
            self._leave()
            raise
        self._counters = counters
        torch.clear_autocast_cache()  # of copies in another dtype, which autocast would go on using

    def take_out(self) -> None:
        """Give the model back the values that it had, and keep these; nothing happens where they are not in it.

        Raises:
            SwapError: Somebody wrote to the weights, cast or moved them in between. Whatever can be put back, is.
        """
        counters = self._counters
        if counters is None:
            return
        reshard(self._model)
        written = [self._parts[index].name for index in counters.written()]
        failed = self._bring_out()
        changed = [part.name for part in self._parts if not part.inside and not part.is_whole()]
        if not (written or failed or changed):
            counters.restore()
        self._counters = None
        self._leave()
        torch.clear_autocast_cache()
        if failed:
            raise SwapError(f"{failed[0]} {self.name} is still in it there: load the model again.")
        if written or changed:
            names = list(dict.fromkeys([*changed, *written]))
            raise SwapError(
                f"Somebody wrote to {len(names)} tensors while {self.name} was in the model: {listing(names)}. The "
                "weights under its mask are those from before again; what was written to others is still there. Load "
                "the model again, and take the values out before weights are trained or loaded."
            )

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, the values are in the model; afterwards, it is what it was."""
        self.put_in()
        try:
            yield
        except BaseException:
            # What went wrong inside is what the caller has to know.
            with contextlib.suppress(SwapError):
                self.take_out()
            raise
        self.take_out()

    def _bring_out(self) -> list[SwapError]:
        """Exchange what is in; what a signal raises in between is raised when everything is out."""
        failed: list[SwapError] = []
        interrupt: BaseException | None = None
        try:
            self._side_by_side(lambda part: part.bring(inside=False))
        except SwapError:
            pass  # the same one comes again
        except BaseException as error:
            interrupt = error
        # One by one, whatever is not out yet.
        for part in self._parts:
            for _ in range(_TRIES):
                try:
                    part.bring(inside=False)
                    break
                except SwapError as error:
                    failed.append(error)
                    break
                except BaseException as error:
                    interrupt = error
        if interrupt is not None:
            self._counters = None
            self._leave()
            raise interrupt
        return failed

    def _side_by_side(self, action: Callable[[_Part], None]) -> None:
        """Do something with every part; on the CPU those that no kernel divides among threads side by side."""
        large = [part for part in self._parts if part.mask.num_elements >= _LARGE]
        small = [part for part in self._parts if part.mask.num_elements < _LARGE]
        for part in large:
            action(part)

        def in_turn(parts: list[_Part]) -> None:
            for part in parts:
                action(part)

        device = torch.device("cpu")
        on_cpu = all(part.mask.device == device for part in small)
        if on_cpu and choose("swap", device).backend == "cpu":
            from subnet_kernels.cpu.threads import num_threads, run

            ways = min(num_threads(), os.cpu_count() or 1)
            run(in_turn, [(small[way::ways],) for way in range(ways)])
        else:
            in_turn(small)

    def _enter(self) -> None:
        with _lock:
            taken = next((_inside[parameter] for parameter in self._parameters if parameter in _inside), None)
            if taken is not None:
                raise SwapError(
                    f"{self.name} cannot enter the model, because {taken} is in it. One at a time: leave the block "
                    "that applies it, or deactivate it, and use a copy of the model where both are needed at once."
                )
            for parameter in self._parameters:
                _inside[parameter] = self.name

    def _leave(self) -> None:
        with _lock:
            for parameter in self._parameters:
                _inside.pop(parameter, None)


class _Part:
    """The values of one tensor, or of the part of it that this process holds.

    Args:
        name: Of the parameter.
        parameter: (N,) in any shape. In-out.
        mask: K bits of N.
        values: (K,) in the parameter's dtype, contiguous. In-out.
    """

    def __init__(self, name: str, parameter: torch.nn.Parameter, mask: BitMask, values: torch.Tensor) -> None:
        self.name, self.parameter, self.mask, self.values = name, parameter, mask, values
        self.inside = False
        self._own = subnet_kernels.fingerprint(values)
        self._is_unsure = False

    def check(self) -> None:
        """Raise SwapError unless the weights are where they were, in the dtype that they had."""
        weights = local(self.parameter)
        found = (weights.dtype, weights.device, weights.numel())
        expected = (self.values.dtype, self.mask.device, self.mask.num_elements)
        if found != expected or not weights.is_contiguous():
            raise SwapError(
                f"`{self.name}` is {found[0]} on {found[1]} with {found[2]:,} weights, and its values are "
                f"{expected[0]} on {expected[1]} for {expected[2]:,}; both must be contiguous. Cast and move the model "
                "before values are prepared for it, or after they are out."
            )

    def bring(self, *, inside: bool) -> None:
        """Exchange values and weights unless they are on that side; it can be tried again after an interrupt."""
        if self._is_unsure:
            # Equal values are on both sides.
            self.inside, self._is_unsure = not self.is_whole(), False
        if self.inside is inside:
            return
        self.check()
        self._is_unsure = True
        subnet_kernels.swap(local_flat(self.parameter), self.mask, self.values)
        self.inside = inside
        self._is_unsure = False

    def is_whole(self) -> bool:
        """Whether the values held are those that were given."""
        return subnet_kernels.fingerprint(self.values) == self._own


class _Counters:
    """The version counters of weights, as they were.

    Args:
        weights: Views that share their counters; those made under `torch.inference_mode` have none.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._counted = [index for index, weight in enumerate(weights) if not weight.is_inference()]
        self._weights = tuple(weights[index] for index in self._counted)
        self._before = _unsafe_preserve_version_counter(self._weights)

    def mark(self) -> None:
        """Count the exchange, whether or not its kernel did."""
        increment_version(self._weights)
        self._marked = [weight._version for weight in self._weights]

    def written(self) -> list[int]:
        """Return the indices of the weights that torch wrote to since `mark`."""
        pairs = zip(self._counted, self._weights, self._marked, strict=True)
        return [index for index, weight, version in pairs if weight._version != version]

    def restore(self) -> None:
        """Set the counters back: the weights have their bits again."""
        self._before.__exit__(None, None, None)


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
