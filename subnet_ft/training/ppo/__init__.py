"""PPO on GRPO's rollouts: a token-level value model, GAE, and a KL penalty in the reward."""

from subnet_ft.training.ppo.config import PPOConfig
from subnet_ft.training.ppo.trainer import PPOTrainer
from subnet_ft.training.ppo.value_model import ValueModel, value_mask_like

__all__ = ["PPOConfig", "PPOTrainer", "ValueModel", "value_mask_like"]
