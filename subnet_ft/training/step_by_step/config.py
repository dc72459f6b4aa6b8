"""`StepByStepConfig`: what distilling step-by-step adds to TRL's `SFTConfig`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trl.trainer.sft_config import SFTConfig


@dataclass
class StepByStepConfig(SFTConfig):
    """Options of a `StepByStepTrainer`: all of `SFTConfig`, and these.

    Two fields have another default than TRL's: `completion_only_loss` is true, because prompts are no target, and
    `remove_unused_columns` is false, because the trainer reads the column `is_rationale`.

    Raises:
        ValueError: A field is out of range, or mixes labels and rationales in one sequence.
    """

    rationale_weight: float = 1.0
    """lambda in L_label + lambda L_rationale (equation 4); >= 0, and 0 trains on labels alone. The paper has 1."""

    completion_only_loss: bool | None = True
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        super().__post_init__()  # type: ignore[no-untyped-call]  # upstream has no types here

    def _problems(self) -> Iterator[str]:
        if not 0 <= self.rationale_weight < math.inf:
            yield f"`rationale_weight` must be a number >= 0, got {self.rationale_weight}; the paper has 1"
        if not self.completion_only_loss:
            yield "`completion_only_loss` must stay true: labels and rationales are the targets, prompts are not"
        if self.remove_unused_columns:
            yield "`remove_unused_columns` must stay false: the column `is_rationale` says which loss a row belongs to"
        for name in ("packing", "padding_free"):
            if getattr(self, name):
                yield f"`{name}` must stay false: it puts labels and rationales into one sequence, and so into one mean"
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):  # the second before TRL 1.16
            given = getattr(self, name, None)
            if isinstance(given, dict) and given.get("use_reentrant"):
                yield (
                    f"`{name}` must not ask for re-entrant checkpointing: it would round the gradients of labels and "
                    "rationales one by one, and give other bits than a run without checkpointing"
                )
