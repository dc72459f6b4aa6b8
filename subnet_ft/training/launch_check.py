"""Refuses launches whose processes could not train together, before any of them trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from subnet_ft.errors import LaunchError
from subnet_ft.processes import num_processes
from subnet_ft.recipe.algorithms import ALGORITHMS
from subnet_ft.recipe.methods import METHODS, trained_methods

if TYPE_CHECKING:
    from transformers import Trainer

    from subnet_ft.recipe import Recipe

LAUNCH = "accelerate launch --config_file recipes/accelerate/ddp.yaml -m subnet_ft"


def refuse_many_processes(command: str) -> None:
    """Refuse a launch with more than one process for a command that works in one.

    Raises:
        LaunchError: `WORLD_SIZE` is above 1.
    """
    count = num_processes()
    if count > 1:
        raise LaunchError(
            f"`{command}` was started in {count} processes (WORLD_SIZE={count}), and runs in one. Start `subnet-ft "
            f"{command}` itself; `run`, `train` and `compare` are those that work under `accelerate launch`."
        )


def refuse_many_devices() -> None:
    """Refuse several visible GPUs, over which the trainer would spread one process (DataParallel).

    Raises:
        LaunchError: torch sees more than one GPU, and no launcher has given this process its own.
    """
    import torch

    count = torch.cuda.device_count()
    if count > 1 and "LOCAL_RANK" not in os.environ:
        raise LaunchError(
            f"torch sees {count} GPUs, and one process trains on one of them. Start a process per GPU, `{LAUNCH} ...` "
            "(docs/many_gpus.md), or choose one GPU: set CUDA_VISIBLE_DEVICES=0."
        )


def check_launch(recipe: Recipe, methods: Sequence[str] = ()) -> None:
    """Refuse a recipe and a launcher's settings that do not go together; nothing to do in one process.

    Args:
        recipe: The recipe.
        methods: What will be trained; the recipe's own method and its baselines when there are none.

    Raises:
        LaunchError: The algorithm's trainer works in one process, or the launcher asks for an engine, a precision or
            shards that a part of the recipe cannot serve.
    """
    if num_processes() == 1:
        return
    if ALGORITHMS[recipe.algorithm].needs_one_process:
        several = ", ".join(name for name, row in ALGORITHMS.items() if not row.needs_one_process)
        raise LaunchError(
            f"`algorithm: {recipe.algorithm}` trains a second model beside the policy, in one process, and this launch "
            f"has {num_processes()}. Start `subnet-ft` itself. Under `accelerate launch` run: {several}."
        )
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise LaunchError(
            "The launcher asks for DeepSpeed, whose engine flattens parameters and steps its own optimizer. Launch "
            "with recipes/accelerate/fsdp2.yaml, which shards as ZeRO-3 does."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise LaunchError(
            f"The launcher asks for `mixed_precision: {precision}`, under which other weights would be trained than "
            "those that are saved and compared. Set `mixed_precision: 'no'` in its file; `model.dtype` of the recipe "
            "says how the weights are held."
        )
    if _is_on("ACCELERATE_USE_FSDP"):
        _check_sharded(recipe, methods)


def _check_sharded(recipe: Recipe, methods: Sequence[str]) -> None:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise LaunchError(
            f"The launcher asks for FSDP {version}, which flattens parameters. Set `fsdp_version: 2` under "
            "`fsdp_config`, as recipes/accelerate/fsdp2.yaml does."
        )
    if _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise LaunchError(
            "The launcher asks for `fsdp_cpu_ram_efficient_loading`, under which all processes but one start with "
            "empty weights, and no mask can be checked against them. Set it to false, as recipes/accelerate/fsdp2.yaml "
            "does."
        )
    known = (METHODS[name] for name in trained_methods(recipe, methods) if name in METHODS)
    asked = [f"`{method.name}` trains an adapter" for method in known if method.trains == "adapter"]
    if recipe.evidence.dynamics_steps is not None:
        asked.append("`evidence.dynamics_steps` compares whole weights while it trains")
    if recipe.subnet.source.steps is not None and recipe.subnet.source.kind != "early":
        asked.append(f"`subnet.source.kind: {recipe.subnet.source.kind}` reads whole moments")
    if recipe.subnet.save_only_delta:
        asked.append("`subnet.save_only_delta` reads whole weights in one process")
    if asked:
        raise LaunchError(
            f"The launcher asks for FSDP, under which every process holds parts of the weights, but {asked[0]}. Launch "
            "with recipes/accelerate/ddp.yaml."
        )


def check_trainer_joined(trainer: Trainer) -> None:
    """Check that accelerate has joined the processes of this launch as it was asked to.

    Raises:
        LaunchError: It has not, and every process would train by itself, or whole where it should be sharded.
    """
    wanted, found = num_processes(), trainer.args.world_size
    if found != wanted:
        raise LaunchError(
            f"This launch has {wanted} processes, and accelerate makes them {found}: each would train by itself. It "
            "found no GPU; on CPUs it joins processes without FSDP, with recipes/accelerate/ddp.yaml."
        )
    if _is_on("ACCELERATE_USE_FSDP") and wanted > 1 and not trainer.is_fsdp_enabled:
        raise LaunchError(
            "The launcher asks for FSDP, and accelerate does not shard on this device: every process would hold the "
            "whole model. On CPUs launch with recipes/accelerate/ddp.yaml."
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on")
