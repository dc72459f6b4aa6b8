"""What processes that train together tell each other."""

from __future__ import annotations

import torch
import torch.distributed as dist


def num_processes(group: dist.ProcessGroup | None = None) -> int:
    """Return how many processes train together, or belong to a group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def communication_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Return where tensors must lie that processes exchange: on the CPU where the backend can, else on the GPU."""
    backend = dist.get_backend(group)
    if backend in ("gloo", "mpi") or "cpu:" in backend:
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if accelerator is None else accelerator
