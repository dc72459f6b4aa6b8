"""One of two processes of `test_sharded.py`: a delta in a model that FSDP2 shards."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deltas.random_deltas import Weights, delta_of, weights_of
from helpers import same_bits, small_model
from torch.distributed.fsdp import fully_shard

from subnet_ft.deltas import HotSwap, applied
from subnet_ft.errors import DeltaMismatchError, SwapError

INPUTS = torch.randn(3, 13, generator=torch.Generator().manual_seed(0))


def whole(model: torch.nn.Module) -> Weights:
    """Return the whole weights of a sharded model."""
    found: dict[str, Any] = dict(model.named_parameters())
    return {name: parameter.full_tensor().detach().clone() for name, parameter in found.items()}


def is_same(actual: Weights, expected: Weights) -> bool:
    """Compare two sets of weights bit by bit."""
    return all(same_bits(actual[name], expected[name]) for name in expected)


def main(folder: Path) -> None:
    """Try everything, and write down what holds."""
    dist.init_process_group("gloo")
    model = small_model(torch.float32)
    base = weights_of(model)
    delta, tuned = delta_of(model)
    other, with_other = delta_of(model, seed=2)
    finite = {name: torch.nan_to_num(weight) for name, weight in tuned.items()}
    plain = small_model(torch.float32)
    for name, parameter in plain.named_parameters():
        parameter.data = finite[name]
    tensors = {
        name: type(tensor)(tensor.bits, finite[name][delta.mask[name]], tensor.shape)
        for name, tensor in delta.tensors.items()
    }
    computed = type(delta)(tensors, delta.base, delta.result)
    fully_shard(model[0])
    fully_shard(model)  # what only the root has stays gathered after a forward pass
    found: dict[str, Any] = {"parts": sum(p.to_local().numel() for p in model.parameters())}
    with torch.no_grad():
        before = model(INPUTS)
        with applied(model, computed):
            found["computes"] = same_bits(model(INPUTS), plain(INPUTS))
        found["computes again"] = same_bits(model(INPUTS), before)
    with applied(model, delta):
        found["inside"] = is_same(whole(model), tuned)
    found["outside"] = is_same(whole(model), base)
    bank = HotSwap(model)
    bank.add("a", delta)
    bank.add("b", other)
    bank.activate("a")
    bank.activate("b")
    found["switched"] = is_same(whole(model), with_other)
    try:
        with applied(model, delta):
            found["nested"] = False
    except (SwapError, DeltaMismatchError):
        found["nested"] = True
    bank.deactivate()
    found["back"] = is_same(whole(model), base)

    loss = model(INPUTS).square().sum()
    with applied(model, computed), torch.no_grad():
        model(INPUTS)
    loss.backward()
    twin = small_model(torch.float32)
    twin(INPUTS).square().sum().backward()
    found["gradients"] = all(
        torch.equal(mine.grad.full_tensor(), theirs.grad)
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True)
    )
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    try:
        with applied(model, delta):
            pass
    except DeltaMismatchError as error:
        found["other base"] = str(error)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo now and then waits for ever, or aborts, when the group is taken down


if __name__ == "__main__":
    main(Path(sys.argv[1]))
