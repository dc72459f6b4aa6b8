"""Sparse checkpoints: a tuned model as a patch of its base."""

from subnet_ft.deltas.applied import applied
from subnet_ft.deltas.apply import apply_delta
from subnet_ft.deltas.comparison import compose_deltas, diff_deltas
from subnet_ft.deltas.delta import Delta, TensorDelta
from subnet_ft.deltas.export import export_delta, masked_delta
from subnet_ft.deltas.file import DeltaFile
from subnet_ft.deltas.hot_swap import HotSwap
from subnet_ft.deltas.in_place import revert_delta
from subnet_ft.deltas.shira import export_shira
from subnet_ft.deltas.verify import verify_delta

__all__ = [
    "Delta",
    "DeltaFile",
    "HotSwap",
    "TensorDelta",
    "applied",
    "apply_delta",
    "compose_deltas",
    "diff_deltas",
    "export_delta",
    "export_shira",
    "masked_delta",
    "revert_delta",
    "verify_delta",
]
