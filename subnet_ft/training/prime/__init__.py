"""PRIME (arXiv 2502.01456) on GRPO's rollouts: process rewards from a reward model that learns from outcomes alone."""

from subnet_ft.training.prime.config import PRIMEConfig
from subnet_ft.training.prime.trainer import PRIMETrainer

__all__ = ["PRIMEConfig", "PRIMETrainer"]
