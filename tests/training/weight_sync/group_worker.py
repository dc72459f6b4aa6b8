"""One of two processes of `test_channels.py`: a sender and a receiver, then a policy that FSDP2 shards over both."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import random_mask
from odd_model import OddModel, odd_mask
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training.weight_sync.small_syncs import tensors_of, train

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import WeightSyncError
from subnet_ft.training.weight_sync import Acknowledgement, GroupChannel, ValuesReceiver, ValuesSender, receive


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """Return SHA-256 over names and bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def group() -> dict[str, Any]:
    """Three updates through a group, and one that comes late."""
    model = tiny_model("llama")
    mask = random_mask(model, 0.1)
    weights: list[str] = []
    versions: list[Any] = []
    if dist.get_rank() == 1:
        receiver = ValuesReceiver(tensors_of(model))
        handled = 0
        while receive(receiver):
            handled += 1
            if receiver.version and receiver.version not in versions:
                versions.append(receiver.version)
                weights.append(digest_of(receiver.tensors))
        return {"weights": weights, "versions": versions, "handled": handled}
    sender, channel = ValuesSender(model, mask), GroupChannel()
    sender.acknowledge(channel.open(sender.open()))
    opened = channel.num_bytes
    first: Any = None
    for step in range(3):
        train(model, mask, step)
        update = sender.update()
        first = first or update
        sender.acknowledge(channel.update(update))
        versions.append(sender.version)
        weights.append(digest_of(tensors_of(model)))
    sent = channel.num_bytes - opened
    refused = ""
    try:
        channel.update(first)
    except WeightSyncError as error:
        refused = str(error)
    channel.close()
    return {
        "weights": weights,
        "versions": versions,
        "refused": refused,
        "update_bytes": sent / 3,
        "num_trainable": mask.num_trainable,
        "num_tensors": len(mask.names),
    }


def messages(model: torch.nn.Module, mask: Any) -> list[str]:
    """Return a digest of what a sender says of a model at its base and after a step."""
    sender = ValuesSender(model, mask)
    opening = sender.open()
    sender.acknowledge(Acknowledgement(opening.stream, 0))
    update = sender.update()
    results = {name: entry.result for name, entry in update.entries.items()}
    return [json.dumps(opening.base.fingerprints), json.dumps(results), digest_of(update.values)]


class CountedGathers:
    """Counts the bytes that each process contributes to all-gathers."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._gather = dist.all_gather

    def __call__(self, outputs: list[torch.Tensor], own: torch.Tensor, **options: Any) -> Any:
        self.num_bytes += own.nbytes
        return self._gather(outputs, own, **options)


def main() -> None:
    """Write what came out in this process."""
    dist.init_process_group("gloo")
    result: dict[str, Any] = {"group": group()}
    whole, sharded, mask = OddModel(torch.bfloat16), OddModel(torch.bfloat16), odd_mask()
    result["whole"] = messages(whole, mask)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    counted = CountedGathers()
    dist.all_gather = counted
    result["sharded"] = messages(sharded, mask)
    result["gathered"] = counted.num_bytes
    result["dense"] = sum(parameter.nbytes for parameter in whole.parameters())
    (Path(sys.argv[1]) / f"result-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # gloo now and then waits for ever when the group is taken down


if __name__ == "__main__":
    main()
