"""A state of which every process holds a part: as a whole on disk, and back into any number of processes."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from subnet_ft.errors import OptimizerError, OptimizerStateError
from subnet_ft.masks import by_canonical_name
from subnet_ft.optim.compact_shard import CompactShard
from subnet_ft.optim.processes import num_processes

if TYPE_CHECKING:
    from subnet_ft.optim.base import MaskedBase

FACTS = "optimizer.json"
"""What is no tensor of K values: param groups, step counts, and the entries of every tensor."""

_WEIGHTS, _STATE = "model.", "optimizer."


def save_sharded(model: torch.nn.Module, optimizer: MaskedBase, folder: Path) -> None:
    """Save weights and state through `torch.distributed.checkpoint`; all processes call it, each writes its part.

    The tensors go to safetensors files, which nothing unpickles. What is loaded again with `load_sharded`, in any
    number of processes.

    Args:
        model: The model in training.
        optimizer: Its optimizer.
        folder: Where the files go; empty or missing, and the same on all machines.

    Raises:
        OptimizerError: A wrapped optimizer keeps tensors that are neither compact nor single numbers.
    """
    saved = optimizer.state_dict()
    groups = {name: group for group in saved["param_groups"] for name in group["params"]}
    tensors: dict[str, Any] = dict(_held(model))
    facts: dict[str, Any] = {"param_groups": saved["param_groups"], "state": {}}
    for name, values in saved["state"].items():
        entries = {
            key: CompactShard.of(value, 0, value.numel())
            if type(value) is torch.Tensor and optimizer.is_compact(groups[name], key, value)
            else value
            for key, value in values.items()
        }
        facts["state"][name] = {key: _described(name, key, entry) for key, entry in entries.items()}
        tensors.update({f"{_STATE}{name}.{k}": v for k, v in entries.items() if isinstance(v, CompactShard)})
    folder.mkdir(parents=True, exist_ok=True)
    if num_processes() == 1 or dist.get_rank() == 0:
        (folder / FACTS).write_text(json.dumps(facts) + "\n")
    with _alone_or_not() as no_dist:
        save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            no_dist=no_dist,
        )


def load_sharded(model: torch.nn.Module, optimizer: MaskedBase, folder: Path) -> None:
    """Load weights and state that `save_sharded` saved in any number of processes; all processes call it.

    Raises:
        OptimizerStateError: The state belongs to another mask, base or kind of optimizer, or files are missing; the
            model was not touched unless its weights were loaded already.
    """
    facts = read_facts(folder)
    optimizer.check_saved_groups(facts["param_groups"])
    state = {
        name: {key: _empty(optimizer, name, key, fact) for key, fact in entries.items()}
        for name, entries in facts["state"].items()
    }
    tensors: dict[str, Any] = dict(_held(model))
    for name, values in state.items():
        tensors.update({f"{_STATE}{name}.{k}": v for k, v in values.items() if isinstance(v, CompactShard)})
    _read(tensors, folder)
    optimizer.load_state_dict({"state": state, "param_groups": facts["param_groups"]})


def load_sharded_weights(model: torch.nn.Module, folder: Path) -> None:
    """Load the weights alone that `save_sharded` saved in any number of processes; all processes call it.

    Raises:
        OptimizerStateError: Files or tensors are missing, or of other shapes.
    """
    _read(dict(_held(model)), folder)


def full_state_dict(optimizer: MaskedBase, *, keep: bool = True) -> dict[str, Any]:
    """Return `optimizer.state_dict()` as one process would have it, on the CPU; all processes call it.

    A tensor at a time is exchanged.

    Args:
        optimizer: The optimizer.
        keep: Whether this process wants the whole; the others only send, and get a state without compact entries.

    Raises:
        OptimizerError: A wrapped optimizer keeps tensors that are neither compact nor single numbers.
    """
    saved = optimizer.state_dict()
    for name, values in saved["state"].items():
        held = optimizer.compact_range(name)
        if held.group is None:
            continue
        for key, value in list(values.items()):
            _described(name, key, value)
            if isinstance(value, CompactShard):
                whole = value.whole(held, keep=keep)
                values[key] = whole
                if whole is None:
                    del values[key]
    return saved


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what a sharded state says about itself.

    Raises:
        OptimizerStateError: It is missing or no JSON of this kind.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
        if not isinstance(facts["state"], dict) or not isinstance(facts["param_groups"], list):
            raise TypeError("`state` is an object and `param_groups` a list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptimizerStateError(
            f"`{folder / FACTS}` cannot be read ({type(error).__name__}: {error}). Resume from another checkpoint."
        ) from error
    return facts


@contextlib.contextmanager
def _alone_or_not() -> Iterator[bool]:
    """Give torch's `no_dist`: one process is meant to be alone, and need not be told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield not (dist.is_available() and dist.is_initialized())


def _read(tensors: dict[str, Any], folder: Path) -> None:
    """Read into tensors and shards, in place."""
    try:
        with _alone_or_not() as no_dist:
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=no_dist)
    except (RuntimeError, ValueError, KeyError, OSError, CheckpointException) as error:
        raise OptimizerStateError(
            f"`{folder}` cannot be loaded: {' '.join(str(error).split())}. Resume from another checkpoint."
        ) from error


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers of a model that belong to its state, such as the biases of a router, by name."""
    found = []
    for prefix, module in model.named_modules():
        passing = module._non_persistent_buffers_set
        found += [
            (f"{prefix}.{name}" if prefix else name, buffer)
            for name, buffer in module.named_buffers(recurse=False)
            if name not in passing
        ]
    return by_canonical_name(found)


def _held(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what is saved of a model, as this process holds it."""
    for name, parameter in by_canonical_name(model.named_parameters()).items():
        yield _WEIGHTS + name, parameter.detach()
    for name, buffer in persistent_buffers(model).items():
        yield _WEIGHTS + name, buffer


def _described(name: str, key: str, value: object) -> dict[str, Any]:
    """Return a JSON object that says what an entry is; the K values of a compact one go elsewhere."""
    if isinstance(value, CompactShard):
        return {"dtype": str(value.values.dtype), "count": value.count}
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        return {"dtype": str(value.dtype), "value": value.item()}
    if isinstance(value, torch.Tensor):
        raise OptimizerError(
            f"The `{key}` of `{name}` has shape {tuple(value.shape)}: it is neither compact nor a single number, so "
            "no other number of processes could load it. Use MaskedAdamW, or an optimizer whose state is element-wise."
        )
    return {"value": value}


def _empty(optimizer: MaskedBase, name: str, key: str, fact: Mapping[str, Any]) -> Any:
    """Return an entry to load into, or the entry itself where the facts hold it."""
    if "value" in fact:
        dtype = fact.get("dtype")
        return fact["value"] if dtype is None else torch.tensor(fact["value"], dtype=_dtype(dtype))
    held = optimizer.compact_range(name)
    if fact["count"] != held.count:
        raise OptimizerStateError(
            f"The saved `{key}` of `{name}` has {fact['count']} values, and the mask trains {held.count} weights of "
            "it. Resume with the mask that the run was started with."
        )
    values = torch.empty(held.length, dtype=_dtype(fact["dtype"]), device=held.device)
    return CompactShard.of(values, held.start, held.count)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise OptimizerStateError(f"A saved entry has dtype {name!r}, which torch does not know.")
    return found
