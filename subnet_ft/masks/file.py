"""The mask file, `NAME.subnet.safetensors`: what it holds, and a reader that trusts nothing.

Per tensor with at least one trainable weight: uint8 `(ceil(N / 8),)`, bit `i` of byte `j` = flat element `8 * j + i`,
padding bits zero. The header's metadata are JSON strings: `format`, `version`, `tensors` (shape and count of every
tensor, also the empty ones, in the model's order) and `provenance`.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import subnet_kernels
from subnet_ft.errors import MaskFileError
from subnet_ft.masks.mask import SubnetMask, TensorMask
from subnet_ft.masks.provenance import Provenance, incompleteness, parse_provenance

FORMAT = "subnet-ft.mask"
VERSION = 1


def check_writable(path: Path) -> None:
    """Check that a mask can be saved at `path`, before the work of making it; nothing is created.

    Raises:
        MaskFileError: `path` is a folder, or its parent is no folder that can be made and written to.
    """
    try:
        if path.is_dir():
            raise MaskFileError(
                f"`{path}` is a folder. Name the file in it, such as `{path / 'run.subnet.safetensors'}`."
            )
        ancestor = path.absolute().parent
        while not ancestor.exists():
            ancestor = ancestor.parent
        if not ancestor.is_dir():
            raise MaskFileError(
                f"`{path}` cannot be written: `{ancestor}` is a file, not a folder. Choose a path in another folder."
            )
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise MaskFileError(
                f"`{path}` cannot be written: there is no permission to write in `{ancestor}`. Choose a path in "
                "another folder, or change its permissions."
            )
    except OSError as error:
        raise _unwritable(path, error) from error


def save_mask(mask: SubnetMask, path: Path) -> Path:
    """Write `mask` to `path`; the file appears whole or not at all.

    Raises:
        MaskFileError: The path cannot be written, or the mask records a base without all its fingerprints and dtypes.
    """
    check_writable(path)
    base = mask.provenance.base
    lack = None if base is None else incompleteness(base, mask.names)
    if lack is not None:
        raise MaskFileError(
            f"The mask is not written to `{path}`: its {lack}, so no one could check that base. Record a dtype and a "
            "fingerprint of every tensor, or no base."
        )
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "tensors": json.dumps({name: {"shape": list(t.shape), "count": t.count} for name, t in mask.tensors.items()}),
        "provenance": json.dumps(asdict(mask.provenance)),
    }
    stored = {name: tensor.bits.contiguous() for name, tensor in mask.tensors.items() if tensor.count}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / path.name
            save_file(stored, temporary, metadata=metadata)
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error
    return path


def load_mask(path: Path) -> SubnetMask:
    """Read and check a mask file.

    Raises:
        MaskFileError: The file is missing, is no safetensors file, or anything in it contradicts the format.
    """
    try:
        if path.is_dir():
            raise MaskFileError(f"`{path}` is a folder, not a mask file. Name the file, `NAME.subnet.safetensors`.")
        if not path.is_file():
            raise MaskFileError(
                f"There is no mask file at `{path}`. `subnet-ft extract BASE TUNED -o {path}` makes one."
            )
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = set(file.keys())
            described = _described_tensors(path, metadata)
            expected = {name for name, (_, count) in described.items() if count}
            if stored != expected:
                odd = sorted(stored ^ expected)[0]
                where = "stored but not described" if odd in stored else "described but not stored"
                raise MaskFileError(
                    f"`{path}`: tensor `{odd}` is {where}; the file is damaged. Extract the mask again."
                )
            tensors = {
                name: _checked_tensor(path, name, shape, count, file.get_tensor(name) if count else None)
                for name, (shape, count) in described.items()
            }
    except SafetensorError as error:
        raise MaskFileError(f"`{path}` is not a readable safetensors file: {error}. Extract the mask again.") from error
    except OSError as error:
        raise MaskFileError(
            f"`{path}` cannot be read: {error.strerror or error}. Check its permissions, or name another file."
        ) from error
    return SubnetMask(tensors, _provenance(path, metadata, described))


def _described_tensors(path: Path, metadata: dict[str, str]) -> dict[str, tuple[tuple[int, ...], int]]:
    if metadata.get("format") != FORMAT:
        raise MaskFileError(
            f"`{path}` is not a mask file: its header says format {metadata.get('format')!r}, expected {FORMAT!r}."
        )
    if metadata.get("version") != str(VERSION):
        raise MaskFileError(
            f"`{path}` has version {metadata.get('version')!r}; this release reads version {VERSION}. Update subnet-ft."
        )
    entries = _json(path, metadata, "tensors")
    described: dict[str, tuple[tuple[int, ...], int]] = {}
    for name, entry in entries.items():
        shape, count = (entry.get("shape"), entry.get("count")) if isinstance(entry, dict) else (None, None)
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise MaskFileError(f"`{path}`: tensor `{name}` has shape {shape!r}; expected a list of sizes.")
        if type(count) is not int or not 0 <= count <= math.prod(shape):
            raise MaskFileError(f"`{path}`: tensor `{name}` of shape {shape} has count {count!r}.")
        described[name] = (tuple(shape), count)
    return described


def _checked_tensor(path: Path, name: str, shape: tuple[int, ...], count: int, bits: torch.Tensor | None) -> TensorMask:
    if bits is None:
        return TensorMask(torch.empty(0, dtype=torch.uint8), shape, 0)
    num_elements = math.prod(shape)
    expected = (num_elements + 7) // 8
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (expected,):
        raise MaskFileError(
            f"`{path}`: the bits of `{name}` are {bits.dtype} {tuple(bits.shape)}; shape {shape} needs uint8 "
            f"({expected},)."
        )
    if num_elements % 8 and int(bits[-1]) >> (num_elements % 8):
        raise MaskFileError(f"`{path}`: padding bits of `{name}` are set, last byte {int(bits[-1]):#010b}.")
    found = subnet_kernels.count_bits(bits)
    if found != count:
        raise MaskFileError(f"`{path}`: `{name}` has {found} bits set but its header says {count}.")
    return TensorMask(bits.clone(), shape, count)


def _provenance(path: Path, metadata: dict[str, str], names: Iterable[str]) -> Provenance:
    fields = _json(path, metadata, "provenance")
    try:
        provenance = parse_provenance(fields)
    except ValueError as error:
        raise MaskFileError(f"`{path}`: its provenance cannot be read: {error}. Extract the mask again.") from error
    lack = None if provenance.base is None else incompleteness(provenance.base, names)
    if lack is not None:
        raise MaskFileError(f"`{path}`: its {lack}, so the base cannot be checked. Extract the mask again.")
    return provenance


def _unwritable(path: Path, error: Exception) -> MaskFileError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return MaskFileError(
        f"`{path}` cannot be written: {reason}. Choose a path in a folder that you may write to and that has room."
    )


def _json(path: Path, metadata: dict[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError) as error:
        raise MaskFileError(f"`{path}`: its header field `{key}` is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise MaskFileError(f"`{path}`: its header field `{key}` is {type(value).__name__}, expected an object.")
    return value
