"""Your own loop on several GPUs: DDP that exchanges compact gradients, and FSDP2 with a checkpoint in parts.

    torchrun --nproc_per_node 2 examples/several_processes.py

Without torchrun it is one process. It runs on CPUs, too.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from _shared import batches, copy_weights, random_mask, report
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from subnet_ft import MaskedAdamW, SubnetMask, prepare_ddp
from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.optim import check_replicas, load_sharded, save_sharded


def step(model: torch.nn.Module, optimizer: MaskedAdamW, batch: torch.Tensor) -> None:
    own = batch.chunk(dist.get_world_size())[dist.get_rank()]
    model(input_ids=own, labels=own).loss.backward()
    optimizer.step()  # takes the mean over the processes, clips on its norm, and updates
    optimizer.zero_grad()


def train_ddp(mask: SubnetMask, data: list[torch.Tensor]) -> torch.nn.Module:
    model = tiny_model("llama")
    prepare_ddp(model)  # before DDP: it reduces one norm, and the optimizer the compact gradients of all the rest
    optimizer = MaskedAdamW(model.named_parameters(), mask, lr=1e-2, max_grad_norm=1.0)
    wrapped = DistributedDataParallel(model)
    for batch in data:
        step(wrapped, optimizer, batch)
    check_replicas(dict(model.named_parameters()))
    return model


def sharded(mask: SubnetMask) -> tuple[torch.nn.Module, MaskedAdamW]:
    model = tiny_model("llama")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    # An optimizer that was built before: `optimizer.rebind(model.named_parameters())`.
    return model, MaskedAdamW(model.named_parameters(), mask, lr=1e-2, max_grad_norm=1.0)


def train_fsdp2(mask: SubnetMask, data: list[torch.Tensor], folder: Path) -> torch.nn.Module:
    model, optimizer = sharded(mask)
    for batch in data[:2]:
        step(model, optimizer, batch)
    save_sharded(model, optimizer, folder)
    model, optimizer = sharded(mask)
    load_sharded(model, optimizer, folder)  # saved by any number of processes
    for batch in data[2:]:
        step(model, optimizer, batch)
    whole = tiny_model("llama")
    with torch.no_grad():
        for weight, part in zip(whole.parameters(), model.parameters(), strict=True):
            weight.copy_(part.full_tensor())  # type: ignore[operator]  # a DTensor
    return whole


def main() -> None:
    if "RANK" in os.environ:
        dist.init_process_group()
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    data = batches(tiny_tokenizer())[:4]
    mask, before = random_mask(tiny_model("llama")), copy_weights(tiny_model("llama"))
    found = [None if dist.get_rank() else tempfile.mkdtemp()]
    dist.broadcast_object_list(found)
    models = {"DDP": train_ddp(mask, data), "FSDP2": train_fsdp2(mask, data, Path(str(found[0]), "checkpoint"))}
    for name, model in models.items():
        if dist.get_rank() == 0:
            report(name, model, before, mask)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
