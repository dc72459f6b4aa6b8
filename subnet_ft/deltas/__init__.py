"""Sparse checkpoints: a tuned model as a patch of its base."""

from subnet_ft.deltas.applied import applied
from subnet_ft.deltas.delta import Delta, TensorDelta
from subnet_ft.deltas.hot_swap import HotSwap

__all__ = ["Delta", "HotSwap", "TensorDelta", "applied"]
