"""Digests of what a stage's result depends on, so that a changed input is noticed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Beside the weights: what decides how a checkpoint is loaded, tokenized and prompted.
_SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_ADAPTER = "adapter_model.safetensors"
_PARTS = ("shard-*.safetensors", "sharded/shard-*.safetensors")
_NOT_THE_MODEL = ("stage.json", "started.json", "log.json", "dynamics.json")


def checkpoint_sha256(folder: Path) -> str:
    """Return the SHA-256 of a model's or an adapter's weights, config, tokenizer and templates, by name and content."""
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    if not any((folder / name).is_file() for name in names):
        names = {str(path.relative_to(folder)) for pattern in _PARTS for path in folder.glob(pattern)}
    names.add(_ADAPTER)
    names |= {path.name for pattern in _SIDE_FILES for path in folder.glob(pattern)} - set(_NOT_THE_MODEL)
    digest = hashlib.sha256()
    for name in sorted(name for name in names if (folder / name).is_file()):
        digest.update(f"{name}\0".encode())
        with (folder / name).open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def json_sha256(values: Iterable[Any]) -> str:
    """Return the SHA-256 of JSON values, one after the other."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def rewards_sha256(rewards: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of the source of every `package.module:function` among the rewards."""
    sources = {}
    for reward in rewards:
        module, colon, _ = reward.partition(":")
        spec = importlib.util.find_spec(module) if colon else None
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            sources[reward] = hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
    return sources
