"""Puts the stand-in where TRL looks for vLLM, until a test ends."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import trl.generation.vllm_client
import trl.generation.vllm_generation
from vllm_stand_in import engine, server

VERSION = "0.30.0"
"""The release of vLLM whose interface TRL is to use."""

_MODULES: dict[str, dict[str, Any]] = {
    "vllm": {
        "__version__": VERSION,
        "LLM": engine.LLM,
        "RequestOutput": engine.RequestOutput,
        "SamplingParams": engine.SamplingParams,
    },
    "vllm.sampling_params": {"StructuredOutputsParams": engine.StructuredOutputsParams},
    "vllm.utils": {},
    "vllm.utils.network_utils": {"get_ip": lambda: "127.0.0.1"},
    "vllm.distributed": {},
    "vllm.distributed.weight_transfer": {},
    "vllm.distributed.weight_transfer.nccl_common": {"trainer_init": server.trainer_init},
    "vllm.distributed.weight_transfer.packed_tensor": {
        "packed_nccl_broadcast_producer": server.packed_nccl_broadcast_producer
    },
}
_ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def install(monkeypatch: pytest.MonkeyPatch, *, is_launched: bool = False) -> None:
    """Make TRL's trainers find the stand-in as `vllm`, import what they need of it, and sync to a CPU.

    Args:
        monkeypatch: Takes everything back.
        is_launched: This is one of several processes, and the launcher's environment stays.
    """
    for name in () if is_launched else _ENVIRONMENT:  # TRL sets them in colocate mode; taken back when the test ends
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, content in _MODULES.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []  # type: ignore[attr-defined]
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    # They look for vLLM when they are imported, so they are imported again, and what was there comes back afterwards.
    names = ("vllm_client", "vllm_generation")
    for name in names:
        monkeypatch.setattr(trl.generation, name, getattr(trl.generation, name))
        monkeypatch.delitem(sys.modules, f"trl.generation.{name}")
    fresh = {name: importlib.import_module(f"trl.generation.{name}") for name in names}
    for name in ("grpo", "rloo", "distillation"):
        trainers = importlib.import_module(f"trl.trainer.{name}_trainer")
        monkeypatch.setattr(trainers, "VLLMGeneration", fresh["vllm_generation"].VLLMGeneration)
    # The only thing that is said of the machine: the client refuses to sync from a device without NCCL.
    cuda = SimpleNamespace(device=lambda *_: SimpleNamespace(type="cuda", index=None))
    monkeypatch.setattr(fresh["vllm_client"], "torch", cuda)
