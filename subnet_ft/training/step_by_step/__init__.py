"""Distilling step-by-step (arXiv 2305.02301) on TRL's SFT: labels and rationales as two losses, one prefix each."""

from subnet_ft.training.step_by_step.config import StepByStepConfig
from subnet_ft.training.step_by_step.trainer import StepByStepTrainer

__all__ = ["StepByStepConfig", "StepByStepTrainer"]
