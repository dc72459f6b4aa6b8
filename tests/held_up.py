"""`subnet-ft` of which one process stands still in the middle of its training, so that a test can kill it there.

HOLD is `PHASE:RANK:STEP:FILE`: in that process, `step` stops in a micro-batch after so many steps, `save` while the
checkpoint of that step is written; the file appears then. Without HOLD nothing stops. SEED_BY_RANK gives every process
another recipe.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from subnet_ft.cli import main


def hold_up(phase: str, step: int, file: Path) -> None:
    """Make this process stand still there."""
    from transformers import Trainer

    from subnet_ft.training import checkpoint_mixin

    def stand_still() -> None:
        file.touch()
        time.sleep(600)

    if phase == "step":
        training_step = Trainer.training_step

        def held(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == step:
                stand_still()
            return training_step(self, *args, **kwargs)

        Trainer.training_step = held
    else:
        save_start = checkpoint_mixin.save_start

        def held_save(state: Any, trainer: Any, folder: Path) -> None:
            save_start(state, trainer, folder)
            if trainer.state.global_step == step:
                stand_still()

        checkpoint_mixin.save_start = held_save


if __name__ == "__main__":
    if "HOLD" in os.environ:
        phase, rank, step, file = os.environ["HOLD"].split(":")
        if rank == os.environ["RANK"]:
            hold_up(phase, int(step), Path(file))
    if "SEED_BY_RANK" in os.environ:
        sys.argv.append(f"seed={os.environ['RANK']}")
    sys.exit(main())
