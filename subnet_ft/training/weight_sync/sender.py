"""The trainer's side of a values-only weight sync."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Protocol

import torch

from subnet_ft.deltas.header import TensorEntry
from subnet_ft.errors import MaskMismatchError, WeightSyncError
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask, by_canonical_name
from subnet_ft.training.weight_sync.compact_values import CompactValues, record_fingerprints
from subnet_ft.training.weight_sync.message import Acknowledgement, Opening, ValuesUpdate, digest


class Channel(Protocol):
    """The way to a receiver; a `ValuesReceiver` in the same process is one."""

    def open(self, opening: Opening) -> Acknowledgement:
        """Bring the mask over; raise WeightSyncError if the receiver refuses it."""

    def update(self, update: ValuesUpdate) -> Acknowledgement:
        """Bring values over; raise WeightSyncError if they were not applied and verified."""


class ValuesSender:
    """Sends the weights of a fixed mask: the bits once, then K values each time.

    Invariant: `version` is the newest version that the receiver has verified, and nothing but its acknowledgement
    moves it. An update that was lost or refused leaves it where it was, and its number is not used again.

    Every process that holds a part of the parameters calls `open` and `update`; one of them, whose messages are
    complete, brings them over.

    Args:
        model: Its parameters are looked up at every update, because FSDP2 replaces them.
        mask: Which weights are sent; what it leaves out must never change.
        base: Name to fingerprint of the weights that the receiver starts from. `None`: those that the mask records, or
            if it records none, those of `model` now.

    Raises:
        MaskMismatchError: The mask belongs to another model.
    """

    def __init__(self, model: torch.nn.Module, mask: SubnetMask, *, base: Mapping[str, str] | None = None) -> None:
        self._model = model
        parameters = self._parameters()
        mask.check_shapes({name: tuple(parameter.shape) for name, parameter in parameters.items()})
        dtypes = {name: str(parameter.dtype).removeprefix("torch.") for name, parameter in parameters.items()}
        known = mask.provenance.base
        if base is None and known is not None:
            odd = next((name for name, dtype in dtypes.items() if known.dtypes.get(name, dtype) != dtype), None)
            if odd is not None:
                raise MaskMismatchError(
                    f"`{odd}` is {dtypes[odd]} but the mask was compared in {known.dtypes[odd]}; values are sent in "
                    "the stored dtype. Train the model in that dtype, or pass `base`."
                )
            base = known.fingerprints
        self._base = ModelRecord(
            name="the policy" if known is None else known.name,
            revision=None if known is None else known.revision,
            dtypes=dtypes,
            fingerprints=dict(record_fingerprints(parameters) if base is None else base),
        )
        self.stream = secrets.token_hex(8)
        source = {**mask.provenance.source, "stream": self.stream}
        self.mask = SubnetMask(mask.tensors, Provenance(base=self._base, source=source))
        self._mask_fingerprint = mask.fingerprint
        self._values = CompactValues(mask)
        self._issued = 0
        self._sent: dict[int, str] = {}
        self.version: int | None = None
        """Version that the receiver has; 0 is the base, `None` before it was opened."""

    def open(self) -> Opening:
        """Return the mask's message; a receiver that takes it is at version 0, the base."""
        self.version = None
        self._sent = {0: ""}
        return Opening(self.mask)

    @torch.no_grad()
    def update(self) -> ValuesUpdate:
        """Return the values as they are now; the policy is not changed before they are taken.

        Raises:
            WeightSyncError: The receiver was not opened.
        """
        if self.version is None:
            raise WeightSyncError("The receiver was not opened: send it `open()`, and `acknowledge` its answer first.")
        parameters = self._parameters()
        trained = {name: parameters[name] for name, tensor in self.mask.tensors.items() if tensor.count}
        self._issued += 1
        result = record_fingerprints(trained)
        # Answers to older updates still count, because the receiver may have applied them.
        self._sent[self._issued] = digest(result)
        base = self._base
        entries = {
            name: TensorEntry(
                shape=tensor.shape,
                dtype=base.dtypes[name],
                count=tensor.count,
                base=base.fingerprints[name],
                result=result.get(name, base.fingerprints[name]),
            )
            for name, tensor in self.mask.tensors.items()
        }
        return ValuesUpdate(
            stream=self.stream,
            version=self._issued,
            follows=self.version,
            mask=self._mask_fingerprint,
            base=base.name,
            entries=entries,
            values=self._values.take(parameters),
        )

    def acknowledge(self, answer: Acknowledgement) -> None:
        """Take a receiver's answer; only this moves `version`.

        Raises:
            WeightSyncError: The answer belongs to another stream, to a version that was never sent or is older than one
                that was acknowledged, or to other weights than those of that version.
        """
        sent = self._sent.get(answer.version)
        if answer.stream != self.stream or sent is None:
            raise WeightSyncError(
                f"The receiver acknowledges version {answer.version} of stream `{answer.stream}`; this sender is "
                f"stream `{self.stream}` and waits for one of {sorted(self._sent)}. Open the receiver again."
            )
        if answer.weights != sent:
            raise WeightSyncError(
                f"The receiver acknowledges version {answer.version} with other weights than were sent: digest "
                f"{answer.weights[:16]}, expected {sent[:16]}. Open the receiver again."
            )
        self.version = answer.version
        self._sent = {version: weights for version, weights in self._sent.items() if version >= answer.version}

    def push(self, channel: Channel) -> Acknowledgement:
        """Open the receiver if it is not, send the values as they are now, and take the answer; in one process."""
        if self.version is None:
            self.acknowledge(channel.open(self.open()))
        answer = channel.update(self.update())
        self.acknowledge(answer)
        return answer

    def _parameters(self) -> dict[str, torch.Tensor]:
        found = by_canonical_name(self._model.named_parameters())
        return {name: parameter.detach() for name, parameter in found.items()}


def check_covers(sent: SubnetMask, trained: SubnetMask) -> None:
    """Check that every weight that is trained now is one that is sent.

    Raises:
        WeightSyncError: The masks differ; the message names a tensor.
    """
    for name, tensor in trained.tensors.items():
        extra = int((tensor.full_bits() & ~sent.tensors[name].full_bits()).count_nonzero()) if tensor.count else 0
        if extra:
            raise WeightSyncError(
                f"The trainer now trains weights of `{name}` that the engine was never told of: its mask changed. Pass "
                "`mask=` the union of all masks of the schedule (`a | b`) to `sync_values_only`."
            )
