"""`ValueSteps`: the value model takes a step whenever the policy does, and never otherwise."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subnet_ft.errors import NonFiniteGradientError, TrainerError
from subnet_ft.optim import MaskedBase
from subnet_ft.training.checkpoint_mixin import CheckpointMixin

if TYPE_CHECKING:
    from subnet_ft.training.ppo.trainer import PPOTrainer

logger = logging.getLogger(__name__)


class ValueSteps(TrainerCallback):
    """Steps the optimizer of the value model right after that of the policy.

    A step that the policy leaves out, because its gradient is not finite, the value model leaves out, too, and the
    other way round. What a restricted trainer does with such a gradient (`nonfinite` of `restrict`) holds for both; a
    trainer that is not restricted raises an error for the value model's.

    Args:
        trainer: Whose value model.
    """

    def __init__(self, trainer: PPOTrainer) -> None:
        self._trainer = trainer
        self._skipped_before = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the gradients of a run that was broken off, and checkpoint activations if the policy does.

        Raises:
            TrainerError: The run was resumed from a checkpoint without a value model, or the value model wants the mask
                of a policy that has none.
        """
        trainer = self._trainer
        if state.global_step > 0 and not isinstance(trainer, CheckpointMixin):
            raise TrainerError(
                f"The run was resumed at step {state.global_step}, but only the checkpoints of a restricted trainer "
                "hold the value model. Call `restrict` on the trainer before both runs; `SubnetMask.full` trains "
                "everything."
            )
        trainer.mask_value_model()
        trainer.value_optimizer.zero_grad()
        is_checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
        if is_checkpointing and not trainer.value_model.is_checkpointing:
            trainer.value_model.checkpoint_activations()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradient of the value model before either takes a step.

        Raises:
            NonFiniteGradientError: It is not finite, and `nonfinite` is `raise`.
        """
        policy = _inner(kwargs["optimizer"])
        self._skipped_before = _num_skipped(policy)
        norm = self._trainer.value_optimizer.grad_norm()
        self._trainer.log_value_metric("grad_norm", float(norm))
        if bool(torch.isfinite(norm)):
            return
        options = getattr(self._trainer, "subnet_options", None)
        nonfinite = "raise" if options is None else options.nonfinite
        if nonfinite == "raise":
            raise NonFiniteGradientError(
                f"Step {state.global_step + 1} was not taken and no weight was changed: the gradient of the value "
                f"model has norm {float(norm)}. Look at the rewards of this batch, or pass `nonfinite='skip'` to "
                "`restrict` to leave such steps out."
            )
        if nonfinite == "skip":
            logger.warning(
                "step %d left out: the gradient of the value model has norm %s", state.global_step + 1, float(norm)
            )
            policy.zero_grad()  # without a gradient it changes nothing
            self._trainer.value_optimizer.zero_grad()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the step, unless the policy left its own out."""
        if _num_skipped(_inner(kwargs["optimizer"])) == self._skipped_before:
            self._trainer.value_optimizer.step()
        else:
            self._trainer.value_optimizer.zero_grad()


def _inner(optimizer: Any) -> Any:
    """Return the optimizer inside the wrapper that accelerate puts around it."""
    return getattr(optimizer, "optimizer", optimizer)


def _num_skipped(optimizer: Any) -> int:
    return optimizer.num_skipped_steps if isinstance(optimizer, MaskedBase) else 0
