"""One of two processes of `test_two_processes.py`: GRPO, whole and cut off in the middle of its completions."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from every_trainer import base_model, build
from helpers import random_mask, same_bits
from transformers import TrainerCallback

from subnet_ft.training import restrict


class CutOff(TrainerCallback):
    """Breaks the run off as a killed machine does, once a checkpoint is there."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise after the checkpoint of step 3."""
        if state.global_step == 3:
            raise KeyboardInterrupt


def trainer(folder: Path) -> Any:
    """Build a GRPO trainer whose completions serve 4 steps."""
    built: Any = build(
        "GRPO",
        folder,
        model=base_model("GRPO"),
        max_steps=6,
        per_device_train_batch_size=2,
        num_iterations=2,
        steps_per_generation=2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        ddp_backend="gloo",
    )
    return restrict(built, random_mask(built.model, 0.3), audit_steps=1)


def main() -> None:
    """Compare a run that was cut off and resumed with one that was not, in this process."""
    folder = Path(sys.argv[1])
    whole = trainer(folder / "whole")
    start = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    whole.train()
    cut = trainer(folder / "cut")
    cut.add_callback(CutOff())
    with contextlib.suppress(KeyboardInterrupt):
        cut.train()
    dist.barrier()
    resumed = trainer(folder / "cut")
    resumed.train(resume_from_checkpoint=True)
    pairs = list(zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True))
    mask = whole.subnet_mask
    off_mask = [name for (name, p), _ in pairs if not same_bits(p.detach()[~mask[name]], start[name][~mask[name]])]
    result = {
        "steps": cut.state.global_step,
        "compact": whole.masked_optimizer.compact_grads,
        "differs": [name for (name, p), q in pairs if not same_bits(p.detach(), q.detach())],
        "off_mask": off_mask,
        "moved": float(sum(((p.detach() != start[name]) & mask[name]).sum() for (name, p), _ in pairs)),
        "trainable": mask.num_trainable,
        "completions": [torch.cat([b["completion_ids"].flatten() for b in whole._buffered_inputs]).tolist()],
        "files": sorted(path.name for path in (folder / "cut" / "checkpoint-6").iterdir()),
    }
    (folder / f"result-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # gloo now and then waits for ever when DDP and the group are taken down


if __name__ == "__main__":
    main()
