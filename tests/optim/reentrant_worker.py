"""One of two processes of `test_reentrant.py`: gradients that arrive in other ways than once per backward pass.

The model's inner layer is used twice, its first block is checkpointed, by re-entrant or by the newer kind. Every way is
trained under DDP with compact gradients, on this process's half of each batch. The folder is the first argument.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedSGD, check_replicas, prepare_ddp

STEPS = 3
WAYS: dict[str, bool | None] = {"plain": None, "re-entrant": True, "newer": False}
"""Whether activations are checkpointed by the re-entrant kind; `None`: not at all."""


class TwiceModel(torch.nn.Module):
    """Uses one layer inside and outside of a checkpointed block."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.use_reentrant = use_reentrant
        self.first = torch.nn.Linear(6, 6)
        self.twice = torch.nn.Linear(6, 6)
        self.norm = torch.nn.LayerNorm(6, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def block(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return (B, 6) of (B, 6), through both layers."""
        return torch.tanh(self.twice(torch.tanh(self.first(inputs))))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the loss () of inputs (B, 6)."""
        if self.use_reentrant is None:
            hidden = self.block(inputs)
        else:
            hidden = checkpoint(self.block, inputs, use_reentrant=self.use_reentrant)
        return self.norm(self.twice(hidden)).square().mul(torch.arange(6.0)).mean()


def batch(step: int) -> torch.Tensor:
    """Return the inputs (8, 6) of a step, of all processes together."""
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def mask() -> SubnetMask:
    """Draw half of the weights."""
    generator = torch.Generator().manual_seed(2)
    named = TwiceModel(None).named_parameters()
    return SubnetMask.from_dense({name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in named})


def train(use_reentrant: bool | None, micro_batches: int, *, is_together: bool) -> dict[str, torch.Tensor]:
    """Train; return the compact gradients of the first step, the weights, and how often `twice` was compacted."""
    model, chosen = TwiceModel(use_reentrant), mask()
    if is_together:
        prepare_ddp(model)
    wrapped = DistributedDataParallel(model) if is_together else model
    optimizer: Any = MaskedSGD(
        model.named_parameters(), chosen, lr=0.1, weight_decay=0.1, max_grad_norm=0.5, compact_grads=is_together
    )
    arrivals = 0

    def arrived(_: torch.Tensor) -> None:
        nonlocal arrivals
        arrivals += 1

    model.twice.weight.register_post_accumulate_grad_hook(arrived)
    found: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        inputs = batch(step).chunk(dist.get_world_size())[dist.get_rank()] if is_together else batch(step)
        parts = inputs.chunk(micro_batches)
        for number, part in enumerate(parts, start=1):
            if is_together:
                wrapped.require_backward_grad_sync = number == len(parts)
            # The re-entrant kind gives no gradient to a block whose inputs need none.
            (wrapped(part.requires_grad_()) / len(parts)).backward()
        if is_together:
            optimizer.grad_norm()  # reduces
        if not step:
            for name, parameter in model.named_parameters():
                found[f"gradient {name}"] = (
                    optimizer._grads().get(parameter).clone() if is_together else parameter.grad[chosen[name]]
                )
        optimizer.step()
        optimizer.zero_grad()
    if is_together:
        check_replicas(dict(model.named_parameters()))
    optimizer.release()
    found |= {f"weight {name}": p.detach().clone() for name, p in model.named_parameters()}
    return {**found, "arrivals": torch.tensor(arrivals)}


def main() -> None:
    """Train in all ways, together and, in this process alone, on all data."""
    dist.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), dist.get_rank()
    alone = train(None, 1, is_together=False)
    arrivals = {}
    for micro_batches in (1, 2):
        for way, use_reentrant in WAYS.items():
            found = train(use_reentrant, micro_batches, is_together=True)
            arrivals[f"{way}-{micro_batches}"] = int(found.pop("arrivals"))
            save_file(found, folder / f"{way}-{micro_batches}-{rank}.safetensors")
    del alone["arrivals"]
    save_file(alone, folder / f"alone-{rank}.safetensors")
    (folder / f"arrivals-{rank}.json").write_text(json.dumps(arrivals))
    dist.barrier()
    os._exit(0)  # gloo now and then waits for ever when DDP and the group are taken down


if __name__ == "__main__":
    main()
