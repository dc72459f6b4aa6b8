"""One of 1, 2 or 4 processes of `test_reduction.py`, `test_shards.py` and `test_sharded_state.py`.

They train a model of odd shapes on one global batch: under DDP with compact gradients, under FSDP2, and as plain DDP.
What came out goes to the folder that is the first argument; the runs of more processes come first.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from odd_model import OddModel, batch, odd_mask
from safetensors.torch import save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from subnet_ft.errors import FrozenWeightError, GradientError, OptimizerError, OptimizerStateError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import (
    MaskedAdamW,
    MaskedBase,
    MaskedOptimizer,
    MaskedSGD,
    check_replicas,
    full_state_dict,
    load_sharded,
    prepare_ddp,
    save_sharded,
)

STEPS = 3
Build = Callable[..., MaskedBase]


@dataclass(frozen=True)
class Way:
    """One way to train together.

    Args:
        engine: `ddp` (compact gradients), `plain ddp` (dense ones) or `fsdp`.
        build: The optimizer.
        options: Of the optimizer.
        is_first: It is built before the model is wrapped or sharded.
        micro_batches: Per step.
        dtype: Of the weights.
        shard: Options of `fully_shard`.
        mesh: Shape of its mesh; `None` for one dimension.
        is_checkpointed: Activations are computed again in the backward pass.
        branch: Only the first process uses the branch of the model, so that the others have no gradient of it.
    """

    engine: str
    build: Build = MaskedSGD
    options: dict[str, Any] = field(default_factory=dict)
    is_first: bool = False
    micro_batches: int = 1
    dtype: torch.dtype = torch.float32
    shard: dict[str, Any] = field(default_factory=dict)
    mesh: tuple[int, ...] | None = None
    is_checkpointed: bool = False
    branch: bool = False


def radam(*args: Any, **options: Any) -> MaskedBase:
    """Wrap an optimizer of torch."""
    return MaskedOptimizer(torch.optim.RAdam, *args, **options)


WAYS = {
    "plain ddp": Way("plain ddp", options={"compact_grads": False}),
    "ddp": Way("ddp"),
    "ddp, optimizer first": Way("ddp", is_first=True),
    "ddp, micro-batches": Way("ddp", micro_batches=2),
    "ddp, a branch that one process uses": Way("ddp", branch=True),
    "fsdp": Way("fsdp"),
    "fsdp, optimizer first": Way("fsdp", is_first=True),
    "fsdp, micro-batches": Way("fsdp", micro_batches=2),
    "fsdp, full norm": Way("fsdp", options={"clip_norm": "full"}),
    "fsdp, checkpointed": Way("fsdp", is_checkpointed=True),
    "fsdp, offloaded": Way("fsdp", shard={"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "fsdp, wrapped": Way("fsdp", build=radam, is_first=True),
    "fsdp, bfloat16": Way("fsdp", build=MaskedAdamW, dtype=torch.bfloat16, options={"master": "remainder"}),
    "fsdp, mesh": Way("fsdp", mesh=(2, 2)),
}


def shard(model: OddModel, way: Way) -> None:
    """Shard a model as accelerate does: its blocks, then the rest."""
    mesh = None
    if way.mesh is not None:
        mesh = init_device_mesh("cpu", way.mesh, mesh_dim_names=("replicate", "shard"))
    if way.is_checkpointed:
        apply_activation_checkpointing(model, check_fn=lambda module: module is model.block)
    fully_shard(model.block, mesh=mesh, **way.shard)
    fully_shard(model, mesh=mesh, **way.shard)


def built(way: Way, mask: SubnetMask) -> tuple[OddModel, torch.nn.Module, MaskedBase]:
    """Return a model, what is called in its place, and its optimizer."""
    model = OddModel(way.dtype)
    wrapped: torch.nn.Module = model
    options = {"lr": 0.05, "weight_decay": 0.1, "max_grad_norm": 0.5, **way.options}

    def optimizer() -> MaskedBase:
        return way.build(model.named_parameters(), mask, **options)

    made = optimizer() if way.is_first else None
    if way.engine == "ddp":
        prepare_ddp(model)
    if way.engine == "fsdp":
        shard(model, way)
        if made is not None:
            made.rebind(model.named_parameters())
    made = made or optimizer()
    if way.engine.endswith("ddp"):
        wrapped = DistributedDataParallel(model, find_unused_parameters=way.engine == "plain ddp")
    return model, wrapped, made


@contextlib.contextmanager
def unsynchronised(wrapped: torch.nn.Module, *, is_last: bool) -> Iterator[None]:
    """Keep DDP and FSDP2 from exchanging gradients before the last micro-batch."""
    if isinstance(wrapped, DistributedDataParallel) and not is_last:
        with wrapped.no_sync():
            yield
        return
    if hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(is_last)
    yield


def train_step(way: Way, wrapped: torch.nn.Module, optimizer: MaskedBase, step: int) -> tuple[float, dict[str, Any]]:
    """Take this process's share of a global batch; return the norm and the compact gradient of the whole."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = batch(step).chunk(size)[rank].chunk(way.micro_batches)
    for number, tokens in enumerate(parts, start=1):
        with unsynchronised(wrapped, is_last=number == len(parts)):
            loss = wrapped(tokens, branch=way.branch and rank == 0) / len(parts)
            loss.backward()
    norm = float(optimizer.grad_norm())
    gradient = {}
    for parameter, name in optimizer._names.items():
        grad = optimizer._grads().get(parameter)
        if grad is not None and optimizer.compact_grads:
            gradient[name] = whole(optimizer, name, grad)
    optimizer.step()
    optimizer.zero_grad()
    return norm, gradient


def whole(optimizer: MaskedBase, name: str, values: torch.Tensor) -> torch.Tensor:
    """Gather compact values that processes hold in parts."""
    from subnet_ft.optim.compact_shard import CompactShard

    held = optimizer.compact_range(name)
    found = CompactShard.of(values, held.start, held.count).whole(held) if held.group is not None else values
    assert found is not None
    return found.clone()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return whole weights, whoever holds them."""
    full = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in model.named_parameters()}
    clean = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in full.items()}
    return {name: value.detach().clone() for name, value in clean.items()}


def off_mask(model: torch.nn.Module, mask: SubnetMask, dtype: torch.dtype) -> list[str]:
    """Return the tensors of which a weight outside the mask has other bits than at the start."""
    before = dict(OddModel(dtype).named_parameters())
    after = weights(model)
    return [n for n, v in after.items() if not torch.equal(v[~mask[n]], before[n].detach()[~mask[n]])]


def train(name: str, way: Way, folder: Path) -> dict[str, Any]:
    """Train in one way, and write gradients and weights of the first process."""
    mask = odd_mask()
    model, wrapped, optimizer = built(way, mask)
    norms, first = [], {}
    for step in range(STEPS):
        norm, gradient = train_step(way, wrapped, optimizer, step)
        norms.append(norm)
        first = first or gradient
    optimizer.audit()
    if way.engine == "ddp":
        check_replicas(dict(model.named_parameters()))
    label = f"{dist.get_world_size()}-{name.replace(', ', '-').replace(' ', '_')}-{dist.get_rank()}"
    save_file({n: v.contiguous() for n, v in weights(model).items()}, folder / f"weights-{label}.safetensors")
    if first:
        save_file(first, folder / f"gradient-{label}.safetensors")
    held = sum(buffer.numel() for buffer in optimizer.gradient_buffers())
    found = {"norms": norms, "off_mask": off_mask(model, mask, way.dtype), "buffers": held}
    optimizer.release()
    return found


def refusals() -> dict[str, str]:
    """Return what is said where nobody would reduce a gradient, replicas differ, or a mask is too much."""
    found = {}
    mask = odd_mask()
    model = OddModel()
    wrapped = DistributedDataParallel(model)
    optimizer = MaskedSGD(model.named_parameters(), mask, lr=0.1, max_grad_norm=None)
    with contextlib.suppress(RuntimeError):
        try:
            wrapped(batch(0)).backward()
        except GradientError as error:
            found["unprepared"] = str(error)
    optimizer.release()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.block.weight[0, 0] += 1
    try:
        check_replicas(dict(model.named_parameters()))
    except FrozenWeightError as error:
        found["replicas"] = str(error)
    prepare_ddp(model)  # the weights of the first process win
    check_replicas(dict(model.named_parameters()))
    try:
        MaskedSGD(model.named_parameters(), mask, lr=0.1, max_grad_norm=1.0, clip_norm="full")
    except GradientError as error:
        found["full norm"] = str(error)
    other = OddModel()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    other.block.weight = torch.nn.Parameter(distribute_tensor(other.block.weight.detach(), mesh, [Shard(1)]))
    try:
        MaskedSGD(other.named_parameters(), mask, lr=0.1, max_grad_norm=None)
    except OptimizerError as error:
        found["second dimension"] = str(error)
    return found


def resumable(folder: Path, build: Build, **options: Any) -> tuple[OddModel, torch.nn.Module, MaskedBase]:
    """Return a sharded model with moments, and its optimizer."""
    del folder
    return built(Way("fsdp", build=build, options=options), odd_mask())


def save_and_go_on(folder: Path, kind: str, build: Build) -> None:
    """Train, save in parts, and train on; the first process also writes the whole state and the last weights."""
    way = Way("fsdp", build=build)
    model, wrapped, optimizer = built(way, odd_mask())
    for step in range(2):
        train_step(way, wrapped, optimizer, step)
    save_sharded(model, optimizer, folder / f"parts-{kind}")
    state = full_state_dict(optimizer)
    if dist.get_rank() == 0:
        torch.save({"state": state, "weights": weights(model)}, folder / f"whole-{kind}.pt")
    else:
        weights(model)
    dist.barrier()
    train_step(way, wrapped, optimizer, 2)
    last = weights(model)
    if dist.get_rank() == 0:
        save_file(last, folder / f"last-{kind}.safetensors")
    optimizer.release()


def load_and_go_on(folder: Path, kind: str, build: Build) -> dict[str, Any]:
    """Load what four processes saved, compare it with the whole, and train on."""
    way = Way("fsdp", build=build)
    model, wrapped, optimizer = built(way, odd_mask())
    load_sharded(model, optimizer, folder / f"parts-{kind}")
    expected = torch.load(folder / f"whole-{kind}.pt", weights_only=True)
    found = full_state_dict(optimizer)
    same = all(
        torch.equal(value, expected["state"]["state"][name][key])
        for name, values in found["state"].items()
        for key, value in values.items()
    )
    same = same and found["state"].keys() == expected["state"]["state"].keys()
    same_weights = all(torch.equal(value, expected["weights"][name]) for name, value in weights(model).items())
    from_whole, _, second = built(way, odd_mask())
    from subnet_ft.optim.sharded_state import load_sharded_weights

    load_sharded_weights(from_whole, folder / f"parts-{kind}")
    second.load_state_dict(expected["state"])
    again = full_state_dict(second)
    same_from_whole = all(
        torch.equal(value, found["state"][name][key])
        for name, values in again["state"].items()
        for key, value in values.items()
    )
    train_step(way, wrapped, optimizer, 2)
    last = weights(model)
    if dist.get_rank() == 0:
        save_file(last, folder / f"last-{kind}-{dist.get_world_size()}.safetensors")
    return {"state": same, "weights": same_weights, "from_whole": same_from_whole}


def trained_by_one() -> dict[str, Any]:
    """Train, under DDP, a tensor of which only the first process has a gradient, in the first step already."""
    dense = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in OddModel().named_parameters()}
    dense["extra.weight"][:] = True
    way = Way("ddp", branch=True)
    model, wrapped, optimizer = built(way, SubnetMask.from_dense(dense))
    train_step(way, wrapped, optimizer, 0)
    check_replicas(dict(model.named_parameters()))
    moved = not torch.equal(model.extra.weight, OddModel().extra.weight)
    optimizer.release()
    return {"moved": moved, "ignored": list(model._ddp_params_and_buffers_to_ignore)}


def dense_after_compact() -> str:
    """Return what is said where DDP was told to leave gradients alone, and a dense optimizer wants them."""
    model = OddModel()
    prepare_ddp(model)
    prepare_ddp(model, kept="wide.bias")
    DistributedDataParallel(model)  # keeps one, or it would refuse
    try:
        MaskedSGD(model.named_parameters(), odd_mask(), lr=0.1, max_grad_norm=None, compact_grads=False)
    except GradientError as error:
        return str(error)
    return ""


def replicas_of_parts() -> str:
    """Return what is said where the replicas of a part differ: one mesh dimension replicates, the other shards."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))
    model = OddModel()
    fully_shard(model, mesh=mesh)
    check_replicas(dict(model.named_parameters()))
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.block.weight.to_local()[0, 0] += 1
    try:
        check_replicas(dict(model.named_parameters()))
    except FrozenWeightError as error:
        return str(error)
    return ""


def buffers_come_back(folder: Path) -> float:
    """Save a persistent buffer in parts, and return what is loaded of it."""
    way, found = Way("fsdp", build=MaskedAdamW), []
    for value in (7.0, 0.0):
        model = OddModel()
        model.register_buffer("bias_of_a_router", torch.full((3,), value))
        shard(model, way)
        optimizer = MaskedAdamW(model.named_parameters(), odd_mask(), lr=0.1, max_grad_norm=None)
        found.append((model, optimizer))
    where = folder / f"buffers-{dist.get_world_size()}"
    save_sharded(*found[0], where)
    dist.barrier()
    load_sharded(*found[1], where)
    return float(found[1][0].bias_of_a_router.sum())


def changed_mask() -> dict[str, Any]:
    """Change the mask of sharded parameters in the middle of training; a frozen tensor may not enter."""
    way, usual, found = Way("fsdp", build=MaskedAdamW), odd_mask(), {}
    dense = {name: usual[name] for name in usual.names}
    without = SubnetMask.from_dense({**dense, "wide.weight": torch.zeros_like(dense["wide.weight"])})
    entering = SubnetMask.from_dense({**dense, "block.bias": torch.ones_like(dense["block.bias"])})
    _, wrapped, optimizer = built(way, usual)
    digests = []
    for step, mask in enumerate((None, without, None, usual, None)):
        if mask is not None:
            optimizer.set_mask(mask)
        train_step(way, wrapped, optimizer, step)
        digests.append(weights(wrapped)["wide.weight"].tolist())
    found["stands still"] = digests[0] == digests[1] == digests[2] != digests[3]
    optimizer.set_mask(entering)
    train_step(way, wrapped, optimizer, 5)
    found["enters"] = not torch.equal(weights(wrapped)["block.bias"], OddModel().block.bias)
    return found


def foreign_mask(folder: Path) -> str:
    """Return what is said of another mask."""
    model, _, _ = built(Way("fsdp", build=MaskedAdamW), odd_mask())
    optimizer = built(Way("fsdp", build=MaskedAdamW), odd_mask(seed=9))[2]
    try:
        load_sharded(model, optimizer, folder / "parts-adamw")
    except OptimizerStateError as error:
        return str(error)
    return ""


def main() -> None:
    """Train in all ways that this number of processes can."""
    dist.init_process_group("gloo")
    folder, size = Path(sys.argv[1]), dist.get_world_size()
    ways = {name: way for name, way in WAYS.items() if way.mesh is None or size == 4}
    result: dict[str, Any] = {"ways": {name: train(name, way, folder) for name, way in ways.items()}}
    kinds: dict[str, Build] = {"adamw": MaskedAdamW, "radam": radam}
    if size == 4:
        for kind, build in kinds.items():
            save_and_go_on(folder, kind, build)
    else:
        result["resumed"] = {kind: load_and_go_on(folder, kind, build) for kind, build in kinds.items()}
    result["foreign"] = foreign_mask(folder)
    result["changed mask"] = changed_mask()
    result["buffers"] = buffers_come_back(folder)
    if size > 1:
        result["trained by one"] = trained_by_one()
        result["dense"] = dense_after_compact()
        result["replicas of parts"] = replicas_of_parts()
        result["refusals"] = refusals()
    (folder / f"result-{size}-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # gloo now and then waits for ever when the group is taken down


if __name__ == "__main__":
    main()
