"""Finetune only the subnetwork that reinforcement learning really changes.

Names are loaded on first use, so that `import subnet_ft` needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Delta": "subnet_ft.deltas",
    "MaskSchedule": "subnet_ft.training",
    "SubnetMask": "subnet_ft.masks",
    "SubnetTrainerMixin": "subnet_ft.training",
    "TrainingDynamics": "subnet_ft.training",
    "applied": "subnet_ft.deltas",
    "apply_delta": "subnet_ft.deltas",
    "export_delta": "subnet_ft.deltas",
    "extract": "subnet_ft.masks",
    "MaskedAdamW": "subnet_ft.optim",
    "MaskedOptimizer": "subnet_ft.optim",
    "MaskedSGD": "subnet_ft.optim",
    "prepare_ddp": "subnet_ft.optim",
    "restrict": "subnet_ft.training",
    "revert_delta": "subnet_ft.deltas",
}

__all__ = [
    "Delta",
    "MaskSchedule",
    "MaskedAdamW",
    "MaskedOptimizer",
    "MaskedSGD",
    "SubnetMask",
    "SubnetTrainerMixin",
    "TrainingDynamics",
    "__version__",
    "applied",
    "apply_delta",
    "export_delta",
    "extract",
    "prepare_ddp",
    "restrict",
    "revert_delta",
]

if TYPE_CHECKING:
    from subnet_ft.deltas import Delta, applied, apply_delta, export_delta, revert_delta
    from subnet_ft.masks import SubnetMask, extract
    from subnet_ft.optim import MaskedAdamW, MaskedOptimizer, MaskedSGD, prepare_ddp
    from subnet_ft.training import MaskSchedule, SubnetTrainerMixin, TrainingDynamics
    from subnet_ft.training.restrict import restrict


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module `subnet_ft` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted(__all__)
