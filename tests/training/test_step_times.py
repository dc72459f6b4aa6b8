"""Step times are those of optimizer steps, whole, and of nothing else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from small_runs import SAVES, plain
from transformers import Trainer

from subnet_ft.training.step_times import StepTimes


class SlowToSave(Trainer):
    """Takes long for what is no part of a step, and some time for every micro-batch."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return super().training_step(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.3)


def test_step_times_hold_all_micro_batches_and_no_saving(tmp_path: Path) -> None:
    times = StepTimes()
    plain(
        tmp_path, trainer_class=SlowToSave, callbacks=[times], max_steps=3, gradient_accumulation_steps=3, **SAVES
    ).train()
    assert len(times.seconds) == 3
    assert 0.06 < times.median < 0.3


def test_step_times_of_no_step() -> None:
    times = StepTimes()
    assert times.median == 0.0
    times.seconds = [3.0, 1.0, 2.0]
    assert times.median == pytest.approx(2.0)
