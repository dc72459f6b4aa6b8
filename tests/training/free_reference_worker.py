"""One of two DDP processes of `test_free_reference_ddp.py`: DPO with a second model, and with a free reference."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from training.free_reference_runs import trainer_with_reference
from training.masked_runs import third_of

from subnet_ft.optim.frozen import weights_digest
from subnet_ft.training import restrict
from subnet_ft.training.free_reference import take_reference_from_policy


def main(folder: Path) -> None:
    """Write down the digest of the weights and the losses of both runs."""
    found = {}
    for kind in ("second", "free"):
        trainer = trainer_with_reference("DPO", folder / kind, max_steps=4, ddp_backend="gloo")
        mask = third_of(trainer.model)
        if kind == "free":
            take_reference_from_policy(trainer, mask)
        restrict(trainer, mask)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[kind] = {"weights": weights_digest(trainer.model), "losses": losses}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
