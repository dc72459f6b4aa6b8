"""What a trainer and an engine tell each other: the mask once, then the values on it, and what arrived.

An opening is a mask file whose provenance names the stream and the complete base. An update is one safetensors buffer:
name to (K,) values in the stored dtype, and as metadata JSON strings what they belong to. Nothing unpickles.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from subnet_ft.errors import MaskError, WeightSyncError
from subnet_ft.masks import ModelRecord, SubnetMask

FORMAT = "subnet-ft.values"
VERSION = 1

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH = 8  # bytes of the length that a safetensors buffer starts with
_STREAM = "stream"


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
        mask: SHA-256 fingerprint of the mask whose bits say where the values go.
        version: Of the weights, > `follows`; every update gets the next number, also after one that was lost.
        follows: The newest version that the receiver has acknowledged.
        result: Name to fingerprint, 32 hexadecimal digits, of every trained tensor with these values in it.
        values: Name to (K,) values in the stored dtype, in the order of the set bits.
    """

    stream: str
    mask: str
    version: int
    follows: int
    result: dict[str, str]
    values: dict[str, torch.Tensor]

    @property
    def num_values(self) -> int:
        """K, the number of values over all tensors."""
        return sum(values.numel() for values in self.values.values())

    def pack(self) -> tuple[str, torch.Tensor]:
        """Return header and payload: JSON, and (bytes,) uint8 on the device of the values, one copy of them."""
        # Wider dtypes first, so that every tensor is aligned in the payload.
        ordered = sorted(self.values, key=lambda name: (-self.values[name].element_size(), name))
        header: dict[str, Any] = {"__metadata__": self._metadata()}
        start = 0
        for name in ordered:
            values = self.values[name]
            header[name] = {
                "dtype": _NAMES[values.dtype],
                "shape": [values.numel()],
                "data_offsets": [start, start + values.nbytes],
            }
            start += values.nbytes
        parts = [self.values[name].contiguous().view(torch.uint8) for name in ordered]
        return json.dumps(header), torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)

    @classmethod
    def unpack(cls, header: str, payload: torch.Tensor) -> ValuesUpdate:
        """Read what `pack` wrote; the values are views of the payload.

        Raises:
            WeightSyncError: The header contradicts the format or the size of the payload.
        """
        entries = _json(header, "header")
        metadata = _mapping(entries.pop("__metadata__", None), "metadata")
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            raise WeightSyncError(
                f"The update says format {metadata.get('format')!r}, version {metadata.get('version')!r}; this "
                f"release reads {FORMAT!r}, version {VERSION}. Use one release on both sides."
            )
        result = _mapping(_json(str(metadata.get("result")), "result"), "result")
        if not all(isinstance(value, str) for value in result.values()):
            raise WeightSyncError("The fingerprints of the update are not all text.")
        return cls(
            stream=str(metadata.get("stream")),
            mask=str(metadata.get("mask")),
            version=_number(metadata, "sync_version"),
            follows=_number(metadata, "follows"),
            result=result,
            values=_slices(entries, payload),
        )

    def to_bytes(self) -> bytes:
        """Write the update as one safetensors buffer."""
        text, payload = self.pack()
        header = text.encode()
        header += b" " * (-len(header) % _LENGTH)
        return len(header).to_bytes(_LENGTH, "little") + header + payload.cpu().numpy().tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> ValuesUpdate:
        """Read what `to_bytes` wrote.

        Raises:
            WeightSyncError: The bytes are no such buffer.
        """
        size = int.from_bytes(data[:_LENGTH], "little")
        if len(data) < _LENGTH or size > len(data) - _LENGTH:
            raise WeightSyncError(f"The update is cut off: {len(data):,} bytes, of which the header claims {size:,}.")
        try:
            header = data[_LENGTH : _LENGTH + size].decode()
        except UnicodeDecodeError as error:
            raise WeightSyncError(f"The header of the update is not text: {error}") from error
        rest = bytearray(data[_LENGTH + size :])
        payload = torch.frombuffer(rest, dtype=torch.uint8) if rest else torch.empty(0, dtype=torch.uint8)
        return cls.unpack(header, payload)

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "version": str(VERSION),
            "stream": self.stream,
            "mask": self.mask,
            "sync_version": str(self.version),
            "follows": str(self.follows),
            "result": json.dumps(self.result),
        }


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

    def to_fields(self) -> dict[str, str]:
        """Return the fields as text, for JSON."""
        return {"stream": self.stream, "version": str(self.version), "weights": self.weights}

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


def _slices(entries: Mapping[str, Any], payload: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cut the payload up as the entries say: one after another, without a gap, to the end."""
    values = {}
    position = 0
    for name, entry in entries.items():
        fields = _mapping(entry, f"entry of `{name}`")
        shape, offsets = fields.get("shape"), fields.get("data_offsets")
        dtype = _DTYPES.get(str(fields.get("dtype")))
        if dtype is None or not _is_sizes(shape, 1) or not _is_sizes(offsets, 2):
            raise WeightSyncError(
                f"The entry of `{name}` is damaged: dtype {fields.get('dtype')!r}, shape {shape}, bytes {offsets}."
            )
        end = position + shape[0] * dtype.itemsize
        if offsets != [position, end] or end > payload.numel() or position % dtype.itemsize:
            raise WeightSyncError(
                f"`{name}` claims bytes {offsets} of {payload.numel():,}; expected {[position, end]}. The update is "
                "damaged."
            )
        values[name] = payload[position:end].view(dtype)
        position = end
    if position != payload.numel():
        raise WeightSyncError(
            f"The update has {payload.numel():,} bytes of values, and its header tells of {position:,}."
        )
    return values


def _is_sizes(value: Any, count: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) == count and all(type(size) is int and size >= 0 for size in value)


def _json(text: str, what: str) -> dict[str, Any]:
    try:
        return _mapping(json.loads(text), what)
    except (ValueError, RecursionError) as error:
        raise WeightSyncError(f"The {what} of the update is not JSON: {error}") from error


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WeightSyncError(f"The {what} of the update is {type(value).__name__}, expected an object.")
    return value


def _number(fields: Mapping[str, Any], key: str) -> int:
    text = str(fields.get(key))
    if not (text.isascii() and text.isdecimal()) or len(text) > 18:
        raise WeightSyncError(f"`{key}` is {text[:40]!r}, expected a number.")
    return int(text)
