"""One of 2 processes of `conftest.py` here: models that FSDP2 shards, saved in every way that torch has for them."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import random_mask
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from subnet_ft.checkpoints.models import save_config
from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.optim import MaskedAdamW, save_sharded

FAMILIES = ("llama", "gpt_neox", "mixtral", "deepseek_v3")
"""Tied weights; other names on disk than in memory; fused weights; those and buffers."""


def sharded(family: str, mesh: DeviceMesh, **options: Any) -> Any:
    """Return a tiny model whose layers, and then the rest, are sharded."""
    model: Any = tiny_model(family, **options)
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def once(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """Leave out the second name of a tied weight, which safetensors refuses."""
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: value for name, value in state.items() if name in own}


def save_whole(model: Any, folder: Path) -> None:
    """Save an ordinary checkpoint; all processes give their parts to it."""
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in
             model.state_dict().items()}  # fmt: skip
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=whole)
        tiny_tokenizer().save_pretrained(folder)


def save_in_parts(state: dict[str, Any], model: Any, folder: Path, **options: Any) -> None:
    """Save with torch's writer of safetensors, and the config beside it."""
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True, **options))
    if dist.get_rank() == 0:
        save_config(model, folder)
        tiny_tokenizer().save_pretrained(folder)


def every_family(folder: Path, mesh: DeviceMesh) -> None:
    """Save models under their own names, under a name of the run, and consolidated."""
    for family in FAMILIES:
        model = sharded(family, mesh, seed=3)
        state = once(model.state_dict(), model)
        save_whole(model, folder / family / "whole")
        save_in_parts(state, model, folder / family / "bare")
        save_in_parts({"app": {"model": state}}, model, folder / family / "nested")
        save_in_parts(state, model, folder / family / "consolidated", enable_consolidation=True)


def other_ways(folder: Path, mesh: DeviceMesh) -> None:
    """Save a model in columns, and pickled: as a trainer does, and with an optimizer in one state."""
    model = sharded("llama", mesh, seed=3)
    state = once(model.state_dict(), model)
    columns = {
        name: distribute_tensor(value.full_tensor(), mesh, [Shard(1) if value.dim() > 1 else Replicate()])
        for name, value in state.items()
    }
    save_in_parts(columns, model, folder / "columns")
    model_state, optimizer_state = get_state_dict(model, torch.optim.AdamW(model.parameters()))
    trainer = folder / "trainer" / "checkpoint-3"
    dcp.save({"model": model_state}, checkpoint_id=trainer / "pytorch_model_fsdp_0")
    dcp.save({"optimizer": optimizer_state}, checkpoint_id=trainer / "optimizer_0")
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "with optimizer")


def transformers_own_way(folder: Path) -> None:
    """Save a model that transformers itself has sharded, in a release that has a way for it."""
    if "distributed_checkpoint" not in inspect.signature(PreTrainedModel.save_pretrained).parameters:
        return
    from transformers.distributed import DistributedConfig

    config: Any = DistributedConfig(fsdp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(folder / "llama" / "whole", distributed_config=config, dtype="auto")
    model.save_pretrained(folder / "transformers", distributed_checkpoint=True)


def masked_run(folder: Path, mesh: DeviceMesh) -> None:
    """Take steps in a subnetwork, and save it in parts, as a trainer does, and whole."""
    mask = random_mask(tiny_model("llama"), 0.2)
    model = sharded("llama", mesh)
    optimizer = MaskedAdamW(model.named_parameters(), mask, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
    for step in range(2):
        tokens = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint = folder / "masked" / "checkpoint-2"
    save_sharded(model, optimizer, checkpoint / "sharded")
    if dist.get_rank() == 0:
        save_config(model, checkpoint)
        tiny_tokenizer().save_pretrained(checkpoint)
        mask.save(folder / "masked" / "mask.subnet.safetensors")
    save_whole(model, folder / "masked" / "whole")


def main() -> None:
    """Save everything."""
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    every_family(folder, mesh)
    other_ways(folder, mesh)
    masked_run(folder, mesh)
    transformers_own_way(folder)
    dist.barrier()
    os._exit(0)  # gloo now and then waits for ever when the group is taken down


if __name__ == "__main__":
    main()
