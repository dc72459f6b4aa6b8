"""Training with TRL's trainers; the only package that imports trl."""

from subnet_ft.training.algorithms import ALGORITHMS, Algorithm, config_fields
from subnet_ft.training.audit import FrozenWeightAudit
from subnet_ft.training.dynamics import TrainingDynamics
from subnet_ft.training.mask_schedule import MaskSchedule
from subnet_ft.training.mixin import SubnetTrainerMixin
from subnet_ft.training.restrict import restrict
from subnet_ft.training.run import TrainingRun, train

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "FrozenWeightAudit",
    "MaskSchedule",
    "SubnetTrainerMixin",
    "TrainingDynamics",
    "TrainingRun",
    "config_fields",
    "restrict",
    "train",
]
