#!/usr/bin/env python3
"""Measure what data-parallel processes send per step: plain DDP beside compact gradients, in bytes and in time.

Usage: torchrun --nproc_per_node=2 scripts/measure_reduction.py [--density 0.1] [--steps 5] [--tiny] [--output FILE]

The model has the shapes of SmolLM2-135M, random weights in bfloat16, and a uniformly random mask; `--tiny` takes a tiny
one. Every collective operation passes a process group that counts the bytes a process hands over and leaves the work to
gloo. What a network then carries depends on the algorithm (a ring sends 2 (P - 1) / P of it), for both ways alike.

Times are medians with the fastest and the slowest, of the first process. That of plain DDP is a backward pass that
reduces minus one under `no_sync`; that of ours is the time inside `Reduction.reduce`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PretrainedConfig

from subnet_ft.bench.memory import random_mask
from subnet_ft.checkpoints.tiny import tiny_config
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW, prepare_ddp
from subnet_ft.optim.reduction import Reduction

SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
VOCABULARY = 49152


class Counted(dist.ProcessGroup):
    """Counts the bytes that this process hands to collective operations, which gloo carries out.

    Operations that are not listed here fail, so that nothing passes uncounted.
    """

    def __init__(self, gloo: dist.ProcessGroupGloo) -> None:
        super().__init__(gloo.rank(), gloo.size())
        self._gloo = gloo
        self.sent: list[tuple[str, int, str]] = []

    def getBackendName(self) -> str:
        return "counted"

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        self._count("allreduce", tensors)
        return self._gloo.allreduce(tensors, options)

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Any:
        self._count("broadcast", tensors)
        return self._gloo.broadcast(tensors, options)

    def allgather(self, outputs: list[list[torch.Tensor]], tensors: list[torch.Tensor], options: Any) -> Any:
        self._count("allgather", tensors)
        return self._gloo.allgather(outputs, tensors, options)

    def barrier(self, opts: Any) -> Any:
        return self._gloo.barrier(opts)

    def _count(self, operation: str, tensors: list[torch.Tensor]) -> None:
        self.sent += [(operation, tensor.nbytes, str(tensor.dtype)) for tensor in tensors]


def counted(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Counted:
    """Build the process group of the backend `counted`."""
    return Counted(dist.ProcessGroupGloo(store, rank, size, timeout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs=2, default=(2, 64), metavar=("ROWS", "LENGTH"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, help="folder for what every process found, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.Backend.register_backend("counted", counted, devices=["cpu"])
    dist.init_process_group("counted")
    config = tiny_config("llama", **({} if args.tiny else SMOLLM2_135M))
    if not args.tiny:
        config.vocab_size = VOCABULARY
    found = {
        "processes": dist.get_world_size(),
        "density": args.density,
        "plain DDP": measure(config, args, is_compact=False),
        "compact": measure(config, args, is_compact=True),
    }
    found["ratio"] = found["compact"]["bytes"] / found["plain DDP"]["bytes"]
    if args.output is not None:
        (args.output / f"reduction-{dist.get_rank()}.json").write_text(json.dumps(found))
    if dist.get_rank() == 0:
        show(found)
    dist.barrier()
    os._exit(0)  # gloo now and then waits for ever when DDP and the group are taken down


def measure(config: PretrainedConfig, args: argparse.Namespace, *, is_compact: bool) -> dict[str, Any]:
    """Train a few steps; return the bytes of one step and the times.

    Args:
        config: Of the model.
        args: Density, steps and tokens.
        is_compact: Reduce compact gradients; else leave dense ones to DDP.
    """
    group = dist.group.WORLD
    assert isinstance(group, Counted)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    mask: SubnetMask = random_mask(model, args.density)
    kept = prepare_ddp(model) if is_compact else None
    wrapped = DistributedDataParallel(model)
    optimizer = MaskedAdamW(model.named_parameters(), mask, lr=1e-5, max_grad_norm=1.0, compact_grads=is_compact)
    tokens = torch.randint(2, config.vocab_size, tuple(args.tokens))
    alone, together, reduced = [], [], []

    def backward(*, is_synchronised: bool) -> float:
        with contextlib.nullcontext() if is_synchronised else wrapped.no_sync():
            loss = wrapped(input_ids=tokens, labels=tokens).loss
            dist.barrier()
            start = time.perf_counter()
            loss.backward()
            return time.perf_counter() - start

    reduce = Reduction.reduce

    def timed(self: Reduction, squares: Any) -> Any:
        dist.barrier()
        start = time.perf_counter()
        result = reduce(self, squares)
        reduced.append(time.perf_counter() - start)
        return result

    Reduction.reduce = timed  # type: ignore[method-assign]
    for _ in range(args.steps + 1):  # the first one warms up: DDP rebuilds its buckets after it
        alone.append(backward(is_synchronised=False))
        optimizer.zero_grad()
        together.append(backward(is_synchronised=True))
        optimizer.step()
        optimizer.zero_grad()
    group.sent.clear()  # one step after another that reduced, with which DDP sends buffers, too
    backward(is_synchronised=True)
    optimizer.step()
    Reduction.reduce = reduce  # type: ignore[method-assign]
    optimizer.release()
    parameters = dict(model.named_parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    differences = [a - b for a, b in zip(together, alone, strict=True)]
    return {
        "sent": list(group.sent),
        "bytes": sum(size for _, size, _ in group.sent),
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "tensors": sum(mask[name].any().item() for name in parameters),
        "trainable": mask.num_trainable,
        "kept_bytes": 0 if kept is None else parameters[kept].nbytes,
        "buffer_bytes": buffers,
        "backward_alone": spread(alone),
        "backward": spread(together),
        "reduction": spread(reduced) if is_compact else spread(differences),
    }


def spread(seconds: list[float]) -> dict[str, float]:
    """Return median, least and greatest of what was measured after the first."""
    measured = seconds[1:]
    return {"median": statistics.median(measured), "least": min(measured), "greatest": max(measured)}


def show(found: dict[str, Any]) -> None:
    """Print the table, and everything as JSON."""
    plain = found["plain DDP"]
    print(
        f"{found['processes']} processes, {plain['parameters'] / 1e6:.1f} M weights in bfloat16, density "
        f"{found['density']}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    print("|  | bytes per step | reduction, s | backward that does not reduce, s | backward that does, s |")
    print("|---|---|---|---|---|")
    for way in ("plain DDP", "compact"):
        row = found[way]
        cells = [
            f"{row[key]['median']:.3f} ({row[key]['least']:.3f} to {row[key]['greatest']:.3f})"
            for key in ("reduction", "backward_alone", "backward")
        ]
        print(f"| {way} | {row['bytes']:,} | {' | '.join(cells)} |")
    print(f"ratio of bytes: {found['ratio']:.4f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
