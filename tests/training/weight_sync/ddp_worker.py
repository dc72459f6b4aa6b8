"""One of two processes of `test_sync.py`: GRPO under DDP, whose first process syncs a stand-in for a vLLM server."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from helpers import same_bits
from training.every_trainer import base_model, build
from training.masked_runs import third_of, weights_of
from vllm_stand_in import install as stand_in
from vllm_stand_in.server import Server

from subnet_ft.errors import WeightSyncError
from subnet_ft.optim.frozen import weights_digest
from subnet_ft.training import restrict
from subnet_ft.training.weight_sync import sync_values_only
from subnet_ft.training.weight_sync.vllm import ValuesWorker


def main() -> None:
    """Train, then let the engine refuse, and write what came out in this process."""
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    patch = pytest.MonkeyPatch()
    stand_in.install(patch, is_launched=True)
    is_main = os.environ["RANK"] == "0"
    model = base_model("GRPO")
    server: Any = None
    where = {"vllm_group_port": port}
    if is_main:
        model.save_pretrained(folder / "served")
        server = Server(str(folder / "served"), ValuesWorker)
        where["vllm_server_base_url"] = server.url
    options = {"use_vllm": True, "vllm_mode": "server", "max_steps": 3, "per_device_train_batch_size": 2}
    trainer: Any = build("GRPO", folder, model=model, ddp_backend="gloo", **options, **where)
    restrict(trainer, third_of(model))
    sender = sync_values_only(trainer)
    result: dict[str, Any] = {"versions": [], "same": [], "digests": []}
    sync = trainer.vllm_generation.sync_weights

    def compared() -> None:
        sync()
        result["versions"].append(sender.version)
        result["digests"].append(weights_digest(trainer.model))
        if is_main:
            engine, policy = server.engine.weights(), weights_of(trainer.model)
            result["same"].append(all(same_bits(engine[name], policy[name]) for name in policy))

    trainer.vllm_generation.sync_weights = compared
    trainer.train()
    if is_main:
        server.worker._receiver.version += 100  # so that the next update is refused
    try:
        sync()
    except WeightSyncError as error:
        result["refused"] = str(error)
    result["version"] = sender.version
    (folder / f"result-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # gloo now and then waits for ever when DDP and the group are taken down


if __name__ == "__main__":
    main()
