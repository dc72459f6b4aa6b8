"""Checkpoints for deltas: a base, what training could make of it, and all bytes of a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import subnet_kernels
from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.deltas import Delta, TensorDelta
from subnet_ft.masks import ModelRecord, format_fingerprint

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def change(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Return a tensor in which about `density` of the elements have other bits, NaN and infinities among them."""
    width = {2: torch.int16, 4: torch.int32}[tensor.itemsize]
    chosen = torch.rand(tensor.shape, generator=generator) < density
    noise = torch.randint(-(2**15), 2**15 - 1, tensor.shape, generator=generator).to(width)
    return torch.where(chosen, tensor.view(width) ^ noise, tensor.view(width)).view(tensor.dtype)


def save_pair(
    folder: Path,
    family: str = "llama",
    *,
    density: float = 0.2,
    seed: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    shard: str = "1GB",
) -> tuple[Path, Path]:
    """Save a base and a tuned checkpoint, with tokenizers; returns both folders."""
    model = tiny_model(family, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for name in ("base", "tuned"):
        model.save_pretrained(folder / name, max_shard_size=shard)
        tiny_tokenizer().save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = change(parameter.data, density, generator)
    return folder / "base", folder / "tuned"


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """Return every file of a folder by name, hidden ones included."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    """Return the weight files and their index, not what waits beside them."""
    return contents(folder, "model*.safetensors") | contents(folder, "model*.json")


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Check that the block changes, adds and removes no file or folder below `folder`."""
    before = _tree(folder)
    yield
    after = _tree(folder)
    assert sorted(before) == sorted(after)
    assert before == after


def _tree(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the outer header of a delta file, and the bytes behind it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path: Path, header: dict[str, Any] | bytes, payload: bytes) -> None:
    """Write a file whose SHA-256 is right, whatever else is wrong with it."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    (digits,) = re.findall(rb'"sha256": ?"([0-9a-f]{64})"', text)  # there may be more than Python can parse
    zeroed = struct.pack("<Q", len(text)) + text.replace(digits, b"0" * 64) + payload
    path.write_bytes(zeroed.replace(b"0" * 64, hashlib.sha256(zeroed).hexdigest().encode(), 1))


def random_case(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Delta]:
    """Draw a small model at random: its weights, what they become, and the delta between the two."""
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    base: dict[str, torch.Tensor] = {}
    tuned: dict[str, torch.Tensor] = {}
    tensors: dict[str, TensorDelta] = {}
    for number in range(1 + below(4)):
        shape = tuple(below(9) for _ in range(below(4)))
        dtype = DTYPES[below(3)]
        weight = change(torch.zeros(shape, dtype=dtype), 1.0, generator)
        name = f"layer.{number}.{'wéight' if below(4) == 0 else 'weight'}"
        base[name] = weight
        tuned[name] = change(weight, (0.0, 0.02, 0.3, 1.0)[below(4)], generator)
        bits, count = subnet_kernels.changed_bits(weight.view(-1), tuned[name].view(-1))
        mask = subnet_kernels.unpack_bits(bits, weight.numel()).view(shape)
        tensors[name] = TensorDelta.build(bits, tuned[name][mask], shape)
        assert tensors[name].count == count
    return base, tuned, Delta(tensors, record(base), record(tuned).fingerprints, {"kind": "random", "seed": seed})


def record(weights: dict[str, torch.Tensor], name: str = "a base") -> ModelRecord:
    """Return the record of a model with these weights."""
    return ModelRecord(
        name,
        None,
        {key: str(weight.dtype).removeprefix("torch.") for key, weight in weights.items()},
        {key: format_fingerprint(subnet_kernels.fingerprint(weight)) for key, weight in weights.items()},
    )
