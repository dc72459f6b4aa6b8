"""Optimizers whose state exists only for the subnetwork."""

from subnet_ft.optim.base import MaskedBase
from subnet_ft.optim.ddp import check_replicas, prepare_ddp
from subnet_ft.optim.ledger import memory_ledger
from subnet_ft.optim.masked_adamw import MaskedAdamW
from subnet_ft.optim.masked_optimizer import MaskedOptimizer
from subnet_ft.optim.masked_sgd import MaskedSGD
from subnet_ft.optim.sharded_state import full_state_dict, load_sharded, save_sharded

__all__ = [
    "MaskedAdamW",
    "MaskedBase",
    "MaskedOptimizer",
    "MaskedSGD",
    "check_replicas",
    "full_state_dict",
    "load_sharded",
    "memory_ledger",
    "prepare_ddp",
    "save_sharded",
]
