"""One of two processes of `test_ddp.py`: trains a tiny model under DDP and prints what came out, as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import GradientError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW

STEPS = 5


def batches(rank: int) -> list[torch.Tensor]:
    """Draw the token ids (4, 12) of every step of a process."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(2, 60, (4, 12), generator=generator) for _ in range(STEPS)]


def train(wrapped: torch.nn.Module, mask: SubnetMask, data: Sequence[torch.Tensor]) -> None:
    """Train on one batch per step."""
    # A large eps makes an update nearly proportional to the gradient: Adam would turn the rounding noise of a gradient
    # that is almost zero into a full step.
    optimizer = MaskedAdamW(
        wrapped.named_parameters(), mask, lr=1e-2, weight_decay=0.1, eps=1e-2, max_grad_norm=1.0, compact_grads=False
    )
    for tokens in data:
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def distance(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """Return the largest difference between two models' weights."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x.detach() - y.detach()).abs().max()) for x, y in pairs)


def main() -> None:
    """Train on data that differ by rank, then, in this process alone, on all of it and on this rank's part of it."""
    dist.init_process_group("gloo")
    model, together, alone = (tiny_model("llama", dtype=torch.float32) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    dense = {name: torch.rand(p.shape, generator=generator) < 0.3 for name, p in model.named_parameters()}
    mask = SubnetMask.from_dense(dense)
    try:
        MaskedAdamW(model.named_parameters(), mask, max_grad_norm=None)
    except GradientError as error:
        refusal = str(error)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    train(DistributedDataParallel(model), mask, batches(dist.get_rank()))
    train(together, mask, [torch.cat(parts) for parts in zip(*map(batches, range(dist.get_world_size())), strict=True)])
    train(alone, mask, batches(dist.get_rank()))

    digest, off_mask, moved = hashlib.sha256(), 0, 0
    for name, parameter in model.named_parameters():
        changed = parameter.detach().view(torch.int32) != start[name].view(torch.int32)
        off_mask += int((changed & ~dense[name]).sum())
        moved += int((changed & dense[name]).sum())
        digest.update(parameter.detach().numpy().tobytes())
    result = {
        "off_mask": off_mask,
        "moved": moved,
        "trainable": mask.num_trainable,
        "refusal": refusal,
        "digest": digest.hexdigest(),
        "to_all_data": distance(model, together),
        "to_own_data": distance(model, alone),
    }
    sys.stdout.write(f"\n{json.dumps(result)}\n")  # in one piece: two processes share it
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
