"""The record of a base that a mask or an adapter belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import subnet_kernels
from subnet_ft.masks.provenance import ModelRecord, format_fingerprint

if TYPE_CHECKING:
    from subnet_ft.checkpoints import Checkpoint


def record_base(checkpoint: Checkpoint, *, dtype: str | None = None) -> ModelRecord:
    """Record a checkpoint with the dtype and the fingerprint of every tensor; one pass over its weights.

    Args:
        checkpoint: The base.
        dtype: The dtype that its weights are cast to first; `None`: as they are stored.
    """
    dtypes, fingerprints = {}, {}
    for name, stored in checkpoint.tensors():
        tensor = stored if dtype is None else stored.to(getattr(torch, dtype))
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        fingerprints[name] = format_fingerprint(subnet_kernels.fingerprint(tensor))
    return ModelRecord(checkpoint.name, checkpoint.revision, dtypes, fingerprints)
