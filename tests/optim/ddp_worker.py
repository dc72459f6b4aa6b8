"""One of two processes of `test_ddp.py`: trains a tiny model under DDP and prints what came out, as JSON."""

from __future__ import annotations

import hashlib
import json

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW


def main() -> None:
    """Train five steps on data that differ by rank."""
    dist.init_process_group("gloo")
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    dense = {name: torch.rand(p.shape, generator=generator) < 0.3 for name, p in model.named_parameters()}
    mask = SubnetMask.from_dense(dense)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wrapped = DistributedDataParallel(model)
    optimizer = MaskedAdamW(wrapped.named_parameters(), mask, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
    data = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(5):
        tokens = torch.randint(2, 60, (4, 12), generator=data)
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        wrapped.zero_grad()
    digest, off_mask, moved = hashlib.sha256(), 0, 0
    for name, parameter in model.named_parameters():
        changed = parameter.detach().view(torch.int16) != start[name].view(torch.int16)
        off_mask += int((changed & ~dense[name]).sum())
        moved += int((changed & dense[name]).sum())
        digest.update(parameter.detach().view(torch.int16).numpy().tobytes())
    result = {"off_mask": off_mask, "moved": moved, "trainable": mask.num_trainable, "digest": digest.hexdigest()}
    print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
