"""The engine's side of a values-only weight sync."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

import torch

import subnet_kernels
from subnet_ft.checkpoints.listing import listing
from subnet_ft.errors import WeightSyncError
from subnet_ft.masks import SubnetMask, format_fingerprint
from subnet_ft.training.weight_sync.message import Acknowledgement, Opening, ValuesUpdate, digest
from subnet_kernels import BitMask

Load = Callable[[Iterable[tuple[str, torch.Tensor]]], object]


class ValuesReceiver:
    """Puts the values of an update into dense tensors, all of them or none.

    Invariant: outside `update` and `open`, the tensors hold the weights of `version` bit by bit, or `version` is
    `None`. An update that is refused changes nothing. `tensors` are the engine's own where it keeps every tensor as the
    model in memory does; for an engine that fuses or shards them they are a copy beside it, and `load` hands them over.
    Not for several threads at once: lock it together with generation.

    Args:
        tensors: Name in memory to contiguous tensor, the base that the trainer starts from. In-out.
        load: Takes pairs of name and whole tensor, those that changed, as vLLM's `load_weights` does.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, load: Load | None = None) -> None:
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        odd = next((name for name, tensor in self.tensors.items() if not tensor.is_contiguous()), None)
        if odd is not None:
            raise WeightSyncError(f"`{odd}` is not contiguous; values are written in the order of memory.")
        self._load = load
        self._opening: Opening | None = None
        self._mask_fingerprint = ""
        self._bit_masks: dict[str, BitMask] = {}
        self._base: dict[str, str] = {}
        self._base_values: dict[str, torch.Tensor] = {}
        self._is_broken = False
        self.version: int | None = None
        """Version of the weights; 0 is the base, `None` before `open`."""

    @property
    def trained_names(self) -> list[str]:
        """The tensors that updates change."""
        return list(self._bit_masks)

    @torch.no_grad()
    def open(self, opening: Opening) -> Acknowledgement:
        """Take a mask, after a check of the base; whatever was applied before is taken back.

        Raises:
            WeightSyncError: Names, shapes, dtypes or weights of the base are others; nothing was changed.
        """
        mask = opening.mask
        self._check_layout(mask, opening.base.dtypes)
        found = self._base or {name: _fingerprint(tensor) for name, tensor in self.tensors.items()}
        for name, expected in opening.base.fingerprints.items():
            if found[name] != expected:
                raise WeightSyncError(
                    f"The engine's weights of `{name}` are not those that the trainer starts from "
                    f"(`{opening.base.name}`): fingerprint {found[name]}, expected {expected}. Load both from one "
                    "checkpoint, in one dtype."
                )
        self._take_back()
        self._base = found
        self._bit_masks = {
            name: BitMask.from_bits(tensor.bits, tensor.num_elements, self.tensors[name].device)
            for name, tensor in mask.tensors.items()
            if tensor.count
        }
        self._base_values = {
            name: subnet_kernels.gather(self._flat(name), bit_mask, dtype=self.tensors[name].dtype)
            for name, bit_mask in self._bit_masks.items()
        }
        self._mask_fingerprint = mask.fingerprint
        self._opening = opening
        self.version = 0
        return Acknowledgement(opening.stream, 0)

    @torch.no_grad()
    def update(self, update: ValuesUpdate) -> Acknowledgement:
        """Apply values and verify every tensor by its fingerprint, before the engine sees any.

        Raises:
            WeightSyncError: Something of the update is wrong, or the engine could not load it; the old weights stand.
        """
        self._check_update(update)
        replaced: dict[str, torch.Tensor] = {}
        found: dict[str, str] = {}
        for name, bit_mask in self._bit_masks.items():
            tensor = self.tensors[name]
            # `swap` leaves the old values in its argument, and the message may go to other receivers, too.
            replaced[name] = update.values[name].to(tensor.device, copy=True)
            subnet_kernels.swap(self._flat(name), bit_mask, replaced[name])
            found[name] = _fingerprint(tensor)
            expected = update.entries[name].result
            if found[name] != expected:
                self._swap_back(replaced)
                raise WeightSyncError(
                    f"With the values of version {update.version}, `{name}` has fingerprint {found[name]}, expected "
                    f"{expected}: they were damaged on the way, or weights outside the mask differ from the "
                    f"trainer's. Version {self.version} stands. Send again; if that fails, open the receiver again."
                )
        try:
            self._load_into_engine(self._bit_masks)
        except Exception as error:
            self._swap_back(replaced)
            self._load_back(update.version, error)
        self.version = update.version
        return Acknowledgement(update.stream, update.version, digest(found))

    def reload(self) -> None:
        """Hand every tensor to the engine, as after a sleep in which it dropped its weights."""
        self._load_into_engine(self.tensors)

    def _load_into_engine(self, names: Iterable[str]) -> None:
        if self._load is not None:
            self._load((name, self.tensors[name]) for name in names)

    def _load_back(self, version: int, reason: Exception) -> NoReturn:
        what = f"The engine could not load version {version}: {reason}."
        try:
            self._load_into_engine(self._bit_masks)
        except Exception as error:
            self._is_broken = True
            raise WeightSyncError(
                f"{what} Nor could it load version {self.version} back: {error}. Generate nothing before the receiver "
                "is opened again."
            ) from error
        raise WeightSyncError(f"{what} Version {self.version} was loaded back.") from reason

    def _take_back(self) -> None:
        """Put the base's values back, where an earlier stream left others."""
        if self.version:
            for name, values in self._base_values.items():
                subnet_kernels.scatter(self._flat(name), self._bit_masks[name], values)
        if self.version or self._is_broken:
            self._load_into_engine(self._bit_masks)
        self._is_broken = False

    def _swap_back(self, replaced: Mapping[str, torch.Tensor]) -> None:
        for name, values in replaced.items():
            subnet_kernels.swap(self._flat(name), self._bit_masks[name], values)

    def _flat(self, name: str) -> torch.Tensor:
        return self.tensors[name].view(-1)

    def _check_layout(self, mask: SubnetMask, dtypes: Mapping[str, str]) -> None:
        missing = [name for name in mask.tensors if name not in self.tensors]
        extra = [name for name in self.tensors if name not in mask.tensors]
        if missing or extra:
            raise WeightSyncError(
                f"Trainer and engine have different tensors: {listing(missing)} only in the trainer, {listing(extra)} "
                "only in the engine. Load both from one checkpoint."
            )
        for name, tensor in mask.tensors.items():
            held = self.tensors[name]
            shape, dtype = tuple(held.shape), str(held.dtype).removeprefix("torch.")
            if (shape, dtype) != (tensor.shape, dtypes[name]):
                raise WeightSyncError(
                    f"`{name}` is {dtype} {shape} in the engine but {dtypes[name]} {tensor.shape} in the trainer. Load "
                    "both from one checkpoint, in one dtype."
                )

    def _check_update(self, update: ValuesUpdate) -> None:
        if self._opening is None or self.version is None:
            raise WeightSyncError("The receiver was not opened, so it has no mask. Send the opening first.")
        if self._is_broken:
            raise WeightSyncError(
                "The engine could load neither the last update nor the weights before it. Open the receiver again."
            )
        if update.stream != self._opening.stream:
            raise WeightSyncError(
                f"The update belongs to stream `{update.stream}`, and the receiver was opened by "
                f"`{self._opening.stream}`. Send the opening of this stream first."
            )
        if update.mask != self._mask_fingerprint:
            raise WeightSyncError(
                f"The update was made under mask {update.mask[:16]}, the receiver has {self._mask_fingerprint[:16]}. "
                "Send the opening again."
            )
        if update.version <= self.version or update.follows > self.version:
            raise WeightSyncError(
                f"Version {update.version}, which follows {update.follows}, does not follow version {self.version} of "
                "the receiver. An older update came late, or the receiver was replaced; open it again in that case."
            )
        base = self._opening.base
        for name, tensor in self._opening.mask.tensors.items():
            expected = (tensor.shape, base.dtypes[name], tensor.count, base.fingerprints[name])
            entry = update.entries.get(name)
            found = None if entry is None else (entry.shape, entry.dtype, entry.count, entry.base)
            if found != expected:
                raise WeightSyncError(
                    f"The update says of `{name}`: {found or 'nothing'}; expected shape, dtype, count and base "
                    f"{expected}. Send the opening again."
                )
        odd = update.entries.keys() ^ self.tensors.keys() | update.values.keys() ^ self._bit_masks.keys()
        if odd:
            raise WeightSyncError(f"The update and the mask differ in the tensor `{min(odd)}`. Send the opening again.")
        for name, bit_mask in self._bit_masks.items():
            values, dtype = update.values[name], self.tensors[name].dtype
            if values.shape != (bit_mask.count,) or values.dtype != dtype:
                raise WeightSyncError(
                    f"The update has {values.dtype} {tuple(values.shape)} for `{name}`, expected {dtype} "
                    f"({bit_mask.count},)."
                )


def _fingerprint(tensor: torch.Tensor) -> str:
    return format_fingerprint(subnet_kernels.fingerprint(tensor))
