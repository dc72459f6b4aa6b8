"""One of two processes of `test_ddp.py`: trains a tiny model under DDP in several ways and writes what came out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW, prepare_ddp

STEPS = 5
FROZEN = "model.layers.0.self_attn.q_proj.weight"
LEAVES = "model.layers.1.mlp.up_proj.weight"
SPOILED = 2


@dataclass(frozen=True)
class Way:
    """One way to train.

    Args:
        options: Of the optimizer.
        masks: Step to the name of the mask that is trained from then on.
        micro_batches: Per step.
        is_spoiled: The loss of the last process is NaN in one step.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[int, str] = field(default_factory=dict)
    micro_batches: int = 1
    is_spoiled: bool = False


WAYS: dict[str, Way] = {
    "as it comes": Way(),
    "a tensor leaves and comes back": Way(masks={1: "without", 3: "all"}),
    "masked norm": Way({"max_grad_norm": 0.5}),
    "full norm": Way({"clip_norm": "full", "max_grad_norm": 0.5}),
    "full norm, a frozen tensor": Way({"clip_norm": "full", "max_grad_norm": 0.5}, masks={0: "not frozen"}),
    "micro-batches": Way(micro_batches=2),
    "NaN in one process": Way({"nonfinite": "skip"}, is_spoiled=True),
    "compact": Way({"compact_grads": True}),
    "compact, a tensor leaves and comes back": Way({"compact_grads": True}, masks={1: "without", 3: "all"}),
    "compact, micro-batches": Way({"compact_grads": True}, micro_batches=2),
    "compact, NaN in one process": Way({"compact_grads": True, "nonfinite": "skip"}, is_spoiled=True),
}


def batches(rank: int) -> list[torch.Tensor]:
    """Draw the token ids (4, 12) of every step of a process."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(2, 60, (4, 12), generator=generator) for _ in range(STEPS)]


def drawn(model: torch.nn.Module) -> dict[str, SubnetMask]:
    """Draw a mask of a third of all weights, one with nothing of `LEAVES`, and one with nothing of `FROZEN`."""
    generator = torch.Generator().manual_seed(0)
    dense = {name: torch.rand(p.shape, generator=generator) < 0.3 for name, p in model.named_parameters()}
    lacks = {"all": "", "without": LEAVES, "not frozen": FROZEN}
    return {
        kind: SubnetMask.from_dense({n: torch.zeros_like(v) if n == lacked else v for n, v in dense.items()})
        for kind, lacked in lacks.items()
    }


@dataclass
class Trained:
    """What training left: the model, digests after every step of all weights and of `LEAVES`, and steps left out."""

    model: torch.nn.Module
    digests: list[str]
    digests_of_one: list[str]
    skipped: int


def train(way: Way, data: Sequence[torch.Tensor], *, is_together: bool) -> Trained:
    """Train a fresh model on one batch per step.

    Args:
        way: How.
        data: Token ids of every step.
        is_together: Under DDP with the other process.
    """
    model = tiny_model("llama", dtype=torch.float32)
    masks = drawn(model)
    if is_together and way.options.get("compact_grads"):
        prepare_ddp(model)
    wrapped = DistributedDataParallel(model) if is_together else model
    # A large eps makes an update nearly proportional to the gradient: Adam would turn the rounding noise of a gradient
    # that is almost zero into a full step.
    known = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-2, "max_grad_norm": 1.0, "compact_grads": False}
    options = {**known, **way.options}
    if not is_together:
        options["compact_grads"] = False  # two processes exist, and this one's gradients are nobody else's
    optimizer = MaskedAdamW(wrapped.named_parameters(), masks[way.masks.get(0, "all")], **options)
    trained = Trained(model, [], [], 0)
    for step, tokens in enumerate(data):
        if step and step in way.masks:
            optimizer.set_mask(masks[way.masks[step]])
        parts = tokens.chunk(way.micro_batches)
        for number, part in enumerate(parts, start=1):
            is_last = number == len(parts)
            with wrapped.no_sync() if is_together and not is_last else contextlib.nullcontext():
                loss = wrapped(input_ids=part, labels=part).loss / len(parts)
                is_spoiled = way.is_spoiled and step == SPOILED and dist.get_rank() == 1
                (loss * float("nan") if is_spoiled else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        trained.digests.append(digest(model.parameters()))
        trained.digests_of_one.append(digest([model.get_parameter(LEAVES)]))
    trained.skipped = optimizer.num_skipped_steps
    return trained


def digest(parameters: Iterable[torch.nn.Parameter]) -> str:
    """Return one digest of some weights."""
    found = hashlib.sha256()
    for parameter in parameters:
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


def distance(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """Return the largest difference between two models' weights."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x.detach() - y.detach()).abs().max()) for x, y in pairs)


def results(way: Way) -> dict[str, Any]:
    """Train on data that differ by rank, then, in this process alone, on all of it and on this rank's part of it."""
    own = batches(dist.get_rank())
    shared = [torch.cat(parts) for parts in zip(*map(batches, range(dist.get_world_size())), strict=True)]
    found = train(way, own, is_together=True)
    together = None if way.is_spoiled else train(way, shared, is_together=False)
    alone = None if way.is_spoiled else train(way, own, is_together=False)
    start, mask = tiny_model("llama", dtype=torch.float32), drawn(found.model)[way.masks.get(0, "all")]
    off_mask = moved = 0
    for (name, parameter), before in zip(found.model.named_parameters(), start.parameters(), strict=True):
        changed = parameter.detach().view(torch.int32) != before.detach().view(torch.int32)
        off_mask += int((changed & ~mask[name]).sum())
        moved += int((changed & mask[name]).sum())
    return {
        "digests": found.digests,
        "digests_of_one": found.digests_of_one,
        "skipped": found.skipped,
        "off_mask": off_mask,
        "moved": moved,
        "trainable": mask.num_trainable,
        "to_all_data": None if together is None else distance(found.model, together.model),
        "to_own_data": None if alone is None else distance(found.model, alone.model),
    }


def main() -> None:
    """Train in all ways."""
    dist.init_process_group("gloo")
    found = {"ways": {name: results(way) for name, way in WAYS.items()}}
    (Path(sys.argv[1]) / f"result-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo now and then waits for ever when DDP and the group are taken down


if __name__ == "__main__":
    main()
