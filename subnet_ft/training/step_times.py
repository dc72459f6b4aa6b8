"""How long optimizer steps take."""

from __future__ import annotations

import statistics
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepTimes(TrainerCallback):
    """Measures the wall time of every optimizer step: generation and all micro-batches, no saving and no logging."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._start)

    @property
    def median(self) -> float:
        """Median seconds of a step; 0.0 when a finished run was resumed and took none."""
        return statistics.median(self.seconds) if self.seconds else 0.0
