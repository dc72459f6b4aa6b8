"""Another mask after so many steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subnet_ft.errors import TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.training.unwrap import unwrapped

logger = logging.getLogger(__name__)


class MaskSchedule(TrainerCallback):
    """Changes the mask of a restricted trainer while it trains, such as from an early mask to the final one.

    Add it to the trainer with `add_callback`. A run that resumes continues under the mask of its step.

    Args:
        masks: Number of finished steps to the mask that is trained from then on. The trainer starts with the mask it
            was restricted to; an entry for 0 must be that one.

    Raises:
        ValueError: There is no mask, or a step is negative.

    Example:
        `restrict(trainer, early).add_callback(MaskSchedule({20: final}))`
    """

    def __init__(self, masks: Mapping[int, SubnetMask]) -> None:
        if not masks or min(masks) < 0:
            raise ValueError(f"`masks` maps steps >= 0 to masks, got steps {sorted(masks)}")
        self.masks = dict(sorted(masks.items()))

    def mask_at(self, step: int) -> SubnetMask | None:
        """Return the mask that is trained after `step` finished steps; `None` before the first change."""
        due = [mask for start, mask in self.masks.items() if start <= step]
        return due[-1] if due else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that training starts, or goes on, under the mask that the schedule says."""
        optimizer, due = unwrapped(kwargs["optimizer"]), self.mask_at(state.global_step)
        if due is not None and due.fingerprint != optimizer.mask.fingerprint:
            raise TrainerError(
                f"At step {state.global_step} the schedule has mask {due.fingerprint[:16]}, and the optimizer trains "
                f"{optimizer.mask.fingerprint[:16]}. Restrict the trainer to the schedule's mask of step 0, and add "
                "the schedule before training starts."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Change the mask where one is due, before anything of that step is saved."""
        mask = self.masks.get(state.global_step)
        if mask is not None:
            unwrapped(kwargs["optimizer"]).set_mask(mask)
            logger.info("step %d: mask of density %.4g from here on", state.global_step, mask.density)
