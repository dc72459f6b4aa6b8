"""Refuses launches of the commands that a trainer would spread over processes or GPUs."""

from __future__ import annotations

import os

from subnet_ft.errors import SubnetError


def refuse_many_processes() -> None:
    """Refuse a launch by torchrun or accelerate with more than one process.

    Raises:
        SubnetError: `WORLD_SIZE` is above 1.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdecimal() and int(count) > 1:
        raise SubnetError(
            f"This command was started in {count} processes (WORLD_SIZE={count}), but the commands of this release run "
            "in one: start `subnet-ft` itself, without torchrun or accelerate. In your own script `restrict` and "
            "`MaskedAdamW` work under DDP."
        )


def refuse_many_devices() -> None:
    """Refuse several visible GPUs, over which the trainer would spread one process (DataParallel).

    Raises:
        SubnetError: torch sees more than one GPU, and no launcher has given this process its own.
    """
    import torch

    count = torch.cuda.device_count()
    if count > 1 and "LOCAL_RANK" not in os.environ:
        raise SubnetError(
            f"torch sees {count} GPUs, but the commands of this release train on one. Choose it: set "
            "CUDA_VISIBLE_DEVICES=0. In your own script `restrict` and `MaskedAdamW` work under DDP."
        )
