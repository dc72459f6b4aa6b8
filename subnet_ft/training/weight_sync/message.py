"""What a trainer and an engine tell each other: the mask once, then the values on it, and what arrived.

An opening is a mask file whose provenance names the stream and the complete base. An update is a delta file that refers
to that mask instead of holding positions (docs/delta_format.md). Nothing unpickles.
"""

from __future__ import annotations

import hashlib
import reprlib
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from subnet_ft.deltas.header import (
    BY_MASK,
    DTYPES,
    STORED_AS,
    VALUES,
    Header,
    TensorEntry,
    parse_header,
    recorded_sha256,
    write_header,
)
from subnet_ft.errors import DeltaFileError, MaskError, WeightSyncError
from subnet_ft.masks import ModelRecord, SubnetMask

KIND = "weight_sync"
"""The `source` of an update's delta: one of a stream of versions."""

_WHERE = Path("the update")  # what the messages of delta files call a file
_LENGTH = 8  # bytes of the length that a safetensors file starts with
_STREAM = "stream"
_NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class Opening:
    """The mask that every following update goes by, sent once.

    Args:
        mask: Its `provenance.base` records dtype and fingerprint of every tensor, and its source the stream.

    Raises:
        WeightSyncError: One of the two is missing.
    """

    mask: SubnetMask

    def __post_init__(self) -> None:
        if self.mask.provenance.base is None or not isinstance(self.mask.provenance.source.get(_STREAM), str):
            raise WeightSyncError(
                "An opening needs a mask that records its base and the stream that it opens, as `ValuesSender.open` "
                "makes it; this one records "
                f"{'no base' if self.mask.provenance.base is None else 'no stream'}."
            )

    @property
    def stream(self) -> str:
        """What tells the updates of this sender from those of any other."""
        return str(self.mask.provenance.source[_STREAM])

    @property
    def base(self) -> ModelRecord:
        """The weights that the receiver must start from."""
        base = self.mask.provenance.base
        assert base is not None
        return base

    def to_bytes(self) -> bytes:
        """Write the opening as the content of a mask file."""
        with tempfile.TemporaryDirectory() as folder:
            return self.mask.save(Path(folder) / "opening.subnet.safetensors").read_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Opening:
        """Read an opening; everything in it is checked as in a mask file.

        Raises:
            WeightSyncError: The bytes are no such file.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "opening.subnet.safetensors"
            path.write_bytes(data)
            try:
                return cls(SubnetMask.load(path))
            except MaskError as error:
                raise WeightSyncError(f"The opening cannot be read: {error}") from error


@dataclass(frozen=True)
class ValuesUpdate:
    """The values of all trained weights at one moment: absolute, so that a lost update is made good by the next.

    Args:
        stream: The stream that it belongs to.
        version: Of the weights, > `follows`; every update gets the next number, also after one that was lost.
        follows: The newest version that the receiver has acknowledged.
        mask: SHA-256 fingerprint of the mask whose bits say where the values go.
        base: What the base is called.
        entries: Every parameter of the model: shape, dtype, count, and fingerprints before and after.
        values: Trained tensor to (K,) values in the stored dtype, in the order of the set bits.
    """

    stream: str
    version: int
    follows: int
    mask: str
    base: str
    entries: dict[str, TensorEntry]
    values: dict[str, torch.Tensor]

    @property
    def num_values(self) -> int:
        """K, the number of values over all tensors."""
        return sum(values.numel() for values in self.values.values())

    def pack(self) -> tuple[bytes, torch.Tensor]:
        """Return the first bytes of the delta file, with zeros for its SHA-256, and what follows them.

        The second is (bytes,) uint8 on the device of the values, one copy of them.
        """
        # Wider dtypes first, so that every tensor is aligned.
        ordered = sorted(self.values, key=lambda name: -self.values[name].element_size())
        stored = {
            VALUES + name: (STORED_AS[self.entries[name].dtype], values.numel(), values.nbytes)
            for name, values in ((name, self.values[name]) for name in ordered)
        }
        source = {"kind": KIND, "stream": self.stream, "version": self.version, "follows": self.follows}
        header = Header(self.entries, self.base, None, source, BY_MASK + self.mask, "raw")
        parts = [self.values[name].contiguous().view(torch.uint8) for name in ordered]
        payload = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
        return write_header(header, stored)[0], payload

    @classmethod
    def unpack(cls, start: bytes, payload: torch.Tensor) -> ValuesUpdate:
        """Read what `pack` returned; the values are views of the payload.

        Raises:
            WeightSyncError: The header contradicts the format or the size of the payload.
        """
        try:
            header, stored = parse_header(_WHERE, start[_LENGTH:], len(start) + payload.numel())
        except DeltaFileError as error:
            raise WeightSyncError(f"The update cannot be read: {error}") from error
        if header.mask_fingerprint is None or header.encoding != "raw" or header.source.get("kind") != KIND:
            raise WeightSyncError(
                f"The message is a delta of kind {header.source.get('kind')!r}, positions {header.positions[:12]!r}, "
                f"encoding {header.encoding!r}; expected {KIND!r}, '{BY_MASK}...' and 'raw'."
            )
        values = {}
        for name, entry in header.entries.items():
            if entry.count:
                lies = stored[VALUES + name]
                part = payload[lies.start - len(start) : lies.end - len(start)]
                if part.storage_offset() % DTYPES[entry.dtype].itemsize:
                    raise WeightSyncError(f"The values of `{name}` do not lie where their dtype can be read.")
                values[name] = part.view(DTYPES[entry.dtype])
        return cls(
            stream=str(header.source.get("stream")),
            version=_number(header.source, "version"),
            follows=_number(header.source, "follows"),
            mask=header.mask_fingerprint,
            base=header.base_name,
            entries=header.entries,
            values=values,
        )

    def to_bytes(self) -> bytes:
        """Write the update as the content of a delta file."""
        start, payload = self.pack()
        content = payload.cpu().numpy().data
        digest = hashlib.sha256(start)
        digest.update(content)
        return start.replace(b"0" * 64, digest.hexdigest().encode(), 1) + bytes(content)

    @classmethod
    def from_bytes(cls, data: bytes) -> ValuesUpdate:
        """Read the content of a delta file.

        Raises:
            WeightSyncError: The bytes are none, or damaged.
        """
        end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
        if len(data) < _LENGTH or end > len(data):
            raise WeightSyncError(f"The update is cut off: {len(data):,} bytes, of which its header takes {end:,}.")
        rest = bytearray(data[end:])
        update = cls.unpack(data[:end], torch.frombuffer(rest, dtype=torch.uint8) if rest else _NOTHING)
        try:
            recorded, zeroed = recorded_sha256(_WHERE, data[:end])
        except DeltaFileError as error:
            raise WeightSyncError(f"The update cannot be read: {error}") from error
        digest = hashlib.sha256(zeroed)
        digest.update(rest)
        if digest.hexdigest() != recorded:
            raise WeightSyncError(f"The update was damaged on the way: its SHA-256 is not {recorded}.")
        return update


@dataclass(frozen=True)
class Acknowledgement:
    """What a receiver has verified.

    Args:
        stream: The stream that it listens to.
        version: Of its weights; 0 is the base.
        weights: `digest` of the fingerprints that it found, empty for the base.
    """

    stream: str
    version: int
    weights: str = ""

    def to_fields(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Acknowledgement:
        """Read what `to_fields` returned.

        Raises:
            WeightSyncError: A field is missing or of another kind.
        """
        return cls(str(fields.get("stream")), _number(fields, "version"), str(fields.get("weights")))


def digest(fingerprints: Mapping[str, str]) -> str:
    """Return SHA-256 over names and fingerprints, as hexadecimal digits."""
    lines = "".join(f"{name}\0{fingerprints[name]}\n" for name in sorted(fingerprints))
    return hashlib.sha256(lines.encode()).hexdigest()


def _number(fields: Mapping[str, Any], key: str) -> int:
    value = fields.get(key)
    if type(value) is not int or value < 0:
        raise WeightSyncError(f"`{key}` is {reprlib.repr(value)}, expected a number >= 0.")
    return value
