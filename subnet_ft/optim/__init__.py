"""Optimizers whose state exists only for the subnetwork."""

from subnet_ft.optim.base import MaskedBase
from subnet_ft.optim.ledger import memory_ledger
from subnet_ft.optim.masked_adamw import MaskedAdamW
from subnet_ft.optim.masked_optimizer import MaskedOptimizer
from subnet_ft.optim.masked_sgd import MaskedSGD

__all__ = ["MaskedAdamW", "MaskedBase", "MaskedOptimizer", "MaskedSGD", "memory_ledger"]
