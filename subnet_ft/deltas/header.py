"""The header of a delta file, `NAME.delta.safetensors`, and a reader of it that trusts nothing.

docs/delta_format.md is the specification; its constants are here.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from subnet_ft.deltas.strict_json import is_deeper, json_object, shown
from subnet_ft.errors import DeltaFileError

FORMAT = "subnet-ft.delta"
VERSION = 1
SUFFIX = ".delta.safetensors"
MAX_HEADER = 1 << 25
"""Bytes of the longest header that is read: that of some 100,000 tensors."""

BITMAP, BY_MASK = "bitmap", "mask:"
"""Where the positions are: bits in the file, or `mask:` and the fingerprint of a mask that has them."""
ENCODINGS = ("raw", "zstd")
BITS, VALUES = "bits/", "values/"
"""What stands before a parameter's name in the names of its two tensors in the file."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STORED_AS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""safetensors' names of the dtypes."""

_SIZES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
_MAX_DIMS = 16
_MAX_ELEMENTS = 1 << 62
_MAX_BASE = 1 << 12
_MAX_DEPTH = 32
"""How deep `source` may nest: what is read must be written again, by code that stands deeper on the stack."""
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorEntry:
    """What a delta says about one parameter.

    Args:
        shape: Its shape in memory.
        dtype: Its stored dtype, a key of `DTYPES`.
        count: K, how many of its weights get a new value.
        base: Fingerprint of the tensor before the delta, 32 hexadecimal digits.
        result: The same after it.
    """

    shape: tuple[int, ...]
    dtype: str
    count: int
    base: str
    result: str

    @property
    def num_elements(self) -> int:
        """N, the number of weights of the tensor."""
        return math.prod(self.shape)

    @property
    def bits_nbytes(self) -> int:
        """Bytes of the decoded bits; 0 when nothing changes."""
        return (self.num_elements + 7) // 8 if self.count else 0

    @property
    def values_nbytes(self) -> int:
        """Bytes of the decoded values."""
        return self.count * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Stored:
    """One tensor of the file: its dtype there, and its bytes as a range of the file."""

    dtype: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """All that a delta file says before its values.

    Args:
        entries: Every parameter of the model, in its order.
        base_name: What the base was called, and `base_revision` its commit, if it came from the Hub.
        source: Where the delta came from: `kind` and more.
        positions: `BITMAP`, or `BY_MASK` and a mask's fingerprint.
        encoding: `raw`, or `zstd`: every tensor of the file is one Zstandard frame.
    """

    entries: dict[str, TensorEntry]
    base_name: str
    base_revision: str | None
    source: dict[str, Any]
    positions: str
    encoding: str

    @property
    def mask_fingerprint(self) -> str | None:
        """The fingerprint of the mask that has the positions; `None` when the file itself has them."""
        return self.positions.removeprefix(BY_MASK) if self.positions.startswith(BY_MASK) else None


def write_header(header: Header, stored: Mapping[str, tuple[str, int, int]]) -> tuple[bytes, int]:
    """Lay out the first bytes of a file, with zeros for the digits of its SHA-256.

    Args:
        header: What to say.
        stored: Tensor of the file to its dtype there, its elements and its bytes, in the order of the file.

    Returns:
        The bytes up to the first value, and where among them the 64 digits start.
    """
    table: dict[str, Any] = {"__metadata__": {"sha256": "0" * 64, **_metadata(header)}}
    start = 0
    for key, (dtype, length, nbytes) in stored.items():
        table[key] = {"dtype": dtype, "shape": [length], "data_offsets": [start, start + nbytes]}
        start += nbytes
    text = _compact(table).encode()
    text += b" " * (-len(text) % 8)
    first = len(b'{"__metadata__":{"sha256":"')
    return len(text).to_bytes(8, "little") + text, 8 + first


def _metadata(header: Header) -> dict[str, str]:
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "encoding": header.encoding,
        "positions": header.positions,
        "base": _compact({"name": header.base_name, "revision": header.base_revision}),
        "source": _compact(header.source),
        "tensors": _compact({name: asdict(entry) for name, entry in header.entries.items()}),
    }


def read_header(path: Path, file: io.FileIO) -> tuple[Header, dict[str, Stored], bytes]:
    """Read and check everything before the values; what is in memory is bounded by `MAX_HEADER`.

    Returns:
        The header; where each tensor of the file lies; and the bytes read, up to the first value.

    Raises:
        DeltaFileError: Anything contradicts the format.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
        limit = f", a header at most {MAX_HEADER:,}" if length > MAX_HEADER else ""
        raise DeltaFileError(
            f"`{path}` is no delta file, or it is truncated: it announces a header of {length:,} bytes and has "
            f"{size:,} in all{limit}."
        )
    text = file.read(length)
    return *parse_header(path, text, size), prefix + text


def parse_header(path: Path, text: bytes, size: int) -> tuple[Header, dict[str, Stored]]:
    """Check what a file of `size` bytes says before its values, as `read_header` does.

    Raises:
        DeltaFileError: Anything contradicts the format. The message is short, whatever the file says.
    """
    if len(text) > MAX_HEADER:
        raise DeltaFileError(f"`{path}`: a header of {len(text):,} bytes; at most {MAX_HEADER:,} are read.")
    table = json_object(path, text, "header")
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DeltaFileError(f"`{path}` has no `__metadata__` of texts in its header, so it is no delta file.")
    stored = _stored_tensors(path, table, 8 + len(text), size)
    header = _parse(path, metadata)
    _check_stored(path, header, stored)
    return header, stored


def recorded_sha256(path: Path, start: bytes) -> tuple[str, bytes]:
    """Return the SHA-256 that a file records, and the bytes of its header with zeros for its digits."""
    digits = json.loads(start[8:])["__metadata__"].get("sha256")
    if not isinstance(digits, str) or not _SHA256.fullmatch(digits) or start.count(digits.encode()) != 1:
        raise DeltaFileError(f"`{path}` records no SHA-256 of itself, or it twice; it is damaged. Get the file again.")
    return digits, start.replace(digits.encode(), b"0" * 64)


def _stored_tensors(path: Path, table: dict[str, Any], first: int, size: int) -> dict[str, Stored]:
    """Check safetensors' own rules: bytes that fit dtype and length, without gap or overlap to the end of the file."""
    found: dict[str, Stored] = {}
    for key, entry in table.items():
        fields = entry if isinstance(entry, dict) else {}
        dtype: Any = fields.get("dtype")
        shape: Any = fields.get("shape")
        offsets: Any = fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _SIZES or not _sizes(shape, 1) or len(shape) != 1:
            raise DeltaFileError(
                f"`{path}`: tensor `{key}` is {shown(dtype)} of shape {shown(shape)}, not a vector of this format."
            )
        if not _sizes(offsets, 2) or len(offsets) != 2 or offsets[1] - offsets[0] != shape[0] * _SIZES[dtype]:
            raise DeltaFileError(f"`{path}`: tensor `{key}`, {dtype} of shape {shape}, cannot lie at {shown(offsets)}.")
        found[key] = Stored(dtype, first + offsets[0], first + offsets[1])
    end = first
    for key, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != end:
            raise DeltaFileError(
                f"`{path}`: tensor `{key}` starts at byte {stored.start:,}, expected {end:,}: tensors overlap, or "
                "bytes belong to none. The file is damaged. Get it again."
            )
        end = stored.end
    if end != size:
        raise DeltaFileError(
            f"`{path}` has {size:,} bytes but its header describes {end:,}: it is truncated, or something was added."
        )
    return found


def _parse(path: Path, metadata: dict[str, str]) -> Header:
    if metadata.get("format") != FORMAT:
        raise DeltaFileError(
            f"`{path}` is not a delta file: its header says format {shown(metadata.get('format'))}, not {FORMAT!r}."
        )
    if metadata.get("version") != str(VERSION):
        raise DeltaFileError(
            f"`{path}` has version {shown(metadata.get('version'))}; this release reads version {VERSION}. Update "
            "subnet-ft."
        )
    positions, encoding = metadata.get("positions", ""), metadata.get("encoding")
    by_mask = positions.startswith(BY_MASK) and _SHA256.fullmatch(positions.removeprefix(BY_MASK))
    if positions != BITMAP and not by_mask:
        raise DeltaFileError(
            f"`{path}`: positions {shown(positions)}; expected {BITMAP!r}, or {BY_MASK!r} and 64 digits."
        )
    if encoding not in ENCODINGS:
        raise DeltaFileError(f"`{path}`: encoding {shown(encoding)}; this release reads {' and '.join(ENCODINGS)}.")
    base = json_object(path, metadata.get("base", ""), "`base`")
    name, revision = base.get("name"), base.get("revision")
    if (
        not isinstance(name, str)
        or not isinstance(revision, str | None)
        or max(map(len, (name, revision or ""))) > _MAX_BASE
    ):
        raise DeltaFileError(
            f"`{path}`: its base is {shown(name)} at revision {shown(revision)}; expected texts of at most {_MAX_BASE} "
            "characters."
        )
    source = json_object(path, metadata.get("source", ""), "`source`")
    if is_deeper(source, _MAX_DEPTH):
        raise DeltaFileError(f"`{path}`: its `source` nests more than {_MAX_DEPTH} deep.")
    tensors = json_object(path, metadata.get("tensors", ""), "`tensors`")
    return Header(
        entries={name: _entry(path, name, fields) for name, fields in tensors.items()},
        base_name=name,
        base_revision=revision,
        source=source,
        positions=positions,
        encoding=encoding,
    )


def _entry(path: Path, name: str, fields: Any) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"shape", "dtype", "count", "base", "result"}:
        raise DeltaFileError(
            f"`{path}`: the entry of `{name}` does not have exactly shape, dtype, count, base, result."
        )
    shape, dtype, count = fields["shape"], fields["dtype"], fields["count"]
    if not _sizes(shape, _MAX_DIMS) or math.prod(shape) > _MAX_ELEMENTS:
        raise DeltaFileError(f"`{path}`: tensor `{name}` has shape {shown(shape)}; expected a list of sizes.")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DeltaFileError(f"`{path}`: tensor `{name}` is {shown(dtype)}; expected one of {', '.join(DTYPES)}.")
    if type(count) is not int or not 0 <= count <= math.prod(shape):
        raise DeltaFileError(f"`{path}`: tensor `{name}` of shape {shape} has count {shown(count)}.")
    for side in ("base", "result"):
        if not isinstance(fields[side], str) or not _FINGERPRINT.fullmatch(fields[side]):
            raise DeltaFileError(f"`{path}`: the {side} fingerprint of `{name}` is not 32 hexadecimal digits.")
    if not count and fields["base"] != fields["result"]:
        raise DeltaFileError(f"`{path}`: `{name}` gets no new value, but its fingerprint changes.")
    return TensorEntry(tuple(shape), dtype, count, fields["base"], fields["result"])


def _check_stored(path: Path, header: Header, stored: Mapping[str, Stored]) -> None:
    changed = {name: entry for name, entry in header.entries.items() if entry.count}
    expected = {VALUES + name for name in changed}
    if header.mask_fingerprint is None:
        expected |= {BITS + name for name in changed}
    odd = expected ^ stored.keys()
    if odd:
        where = "stored but not described" if min(odd) in stored else "described but not stored"
        raise DeltaFileError(f"`{path}`: tensor `{min(odd)}` is {where}; the file is damaged. Get it again.")
    for key in expected:
        prefix = VALUES if key.startswith(VALUES) else BITS
        entry = changed[key.removeprefix(prefix)]
        nbytes = entry.values_nbytes if prefix == VALUES else entry.bits_nbytes
        plain = header.encoding == "raw"
        dtype = STORED_AS[entry.dtype] if plain and prefix == VALUES else "U8"
        found = stored[key]
        if found.dtype != dtype or (plain and found.nbytes != nbytes):
            raise DeltaFileError(
                f"`{path}`: `{key}` is {found.dtype} of {found.nbytes:,} bytes; shape {entry.shape} with count "
                f"{entry.count} needs {dtype}" + (f" of {nbytes:,} bytes." if plain else ".")
            )


def _sizes(value: Any, limit: int) -> bool:
    is_short_list = isinstance(value, list) and len(value) <= limit
    return is_short_list and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
