"""Optimizers whose state exists only for the subnetwork."""

from subnet_ft.optim.ledger import memory_ledger
from subnet_ft.optim.masked_adamw import MaskedAdamW

__all__ = ["MaskedAdamW", "memory_ledger"]
