"""Models on disk: finding them by name, and reading their parameters as they are in memory.

Names resolve without torch or transformers; opening a checkpoint imports both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from subnet_ft.checkpoints.resolve import resolve_checkpoint

if TYPE_CHECKING:
    from subnet_ft.checkpoints.checkpoint import Checkpoint, open_checkpoint
    from subnet_ft.checkpoints.models import undo_upcasts
    from subnet_ft.checkpoints.shards import TensorSpec

__all__ = ["Checkpoint", "TensorSpec", "open_checkpoint", "resolve_checkpoint", "undo_upcasts"]


def __getattr__(name: str) -> Any:
    if name in ("Checkpoint", "open_checkpoint", "TensorSpec"):
        from subnet_ft.checkpoints import checkpoint

        return getattr(checkpoint, name)
    if name == "undo_upcasts":
        from subnet_ft.checkpoints import models

        return models.undo_upcasts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
