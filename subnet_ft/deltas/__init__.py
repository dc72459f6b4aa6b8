"""Sparse checkpoints: a tuned model as a patch of its base."""

from subnet_ft.deltas.delta import Delta, TensorDelta

__all__ = ["Delta", "TensorDelta"]
