"""One of two processes of `test_two_processes.py`: GRPO, whole and cut off in the middle of its completions; masks that
change, NaN in one process, checkpoints of the model alone, and dynamics."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import random_mask, same_bits
from small_runs import restricted
from training.every_trainer import base_model, build
from transformers import TrainerCallback

import subnet_kernels
from subnet_ft.masks import SubnetMask, format_fingerprint
from subnet_ft.optim.frozen import weights_digest
from subnet_ft.training import MaskSchedule, TrainingDynamics, restrict

LEAVES = "model.layers.1.mlp.up_proj.weight"


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


class Notes(TrainerCallback):
    """Writes down a digest of all weights, and one of `LEAVES`, at the end of every step."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self.one: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take both."""
        model = kwargs["model"]
        self.all.append(weights_digest(model))
        self.one.append(format_fingerprint(subnet_kernels.fingerprint(model.get_parameter(LEAVES).detach())))


def noted(folder: Path, **options: Any) -> tuple[Any, Notes]:
    """Build a short run of `transformers.Trainer` under the usual mask, and what its steps leave."""
    notes = Notes()
    built = restricted(folder, callbacks=[notes], ddp_backend="gloo", max_steps=6, **options)
    return built, notes


def changing(folder: Path, **options: Any) -> tuple[Any, Notes]:
    """Two micro-batches to a step, clipped and audited; a tensor leaves the mask and comes back."""
    accumulates = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.1}
    built, notes = noted(folder, subnet={"audit_steps": 1}, **accumulates, **options)
    usual = built.subnet_mask
    dense = {name: usual[name] & (name != LEAVES) for name in usual.names}
    built.add_callback(MaskSchedule({2: SubnetMask.from_dense(dense), 4: usual}))
    return built, notes


def other_runs(folder: Path) -> dict[str, Any]:
    """Train in other ways, and say what came out."""
    built, changed = changing(folder / "changing", save_strategy="steps", save_steps=1)
    built.train()
    norms = [entry["grad_norm"] for entry in built.state.log_history if "grad_norm" in entry]
    again, resumed = changing(folder / "changing")
    again.train(resume_from_checkpoint=str(folder / "changing" / "checkpoint-3"))
    built, spoiled = noted(folder / "spoiled", subnet={"nonfinite": "skip"})
    compute = built.compute_loss

    def nan_in_one(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        return loss * float("nan") if built.state.global_step == 2 and dist.get_rank() == 1 else loss

    built.compute_loss = nan_in_one
    built.train()
    alone, _ = noted(folder / "alone", save_strategy="steps", save_steps=3, save_only_model=True)
    alone.train()
    sparse, in_deltas = noted(folder / "sparse", subnet={"save_only_delta": True}, save_strategy="steps", save_steps=3)
    sparse.train()
    again, from_delta = noted(folder / "sparse")
    again.train(resume_from_checkpoint=str(folder / "sparse" / "checkpoint-3"))
    observed, seen = noted(folder / "observed")
    observed.add_callback(TrainingDynamics(folder / "base", 2))
    observed.train()
    quiet, unseen = noted(folder / "quiet")
    quiet.train()
    dist.barrier()
    return {
        "observed": seen.all,
        "quiet": unseen.all,
        "in_deltas": in_deltas.all,
        "from_delta": from_delta.all,
        "sparse": sorted(path.name for path in (folder / "sparse" / "checkpoint-3").glob("*.safetensors")),
        "changing": changed.all,
        "leaving": changed.one,
        "norms": norms,
        "resumed": resumed.all,
        "spoiled": spoiled.all,
        "skipped": built.masked_optimizer.num_skipped_steps,
        "alone": sorted(str(path.relative_to(folder / "alone")) for path in (folder / "alone").glob("checkpoint-*/*")),
    }


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
        **other_runs(folder),
    }
    (folder / f"result-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # gloo now and then waits for ever when DDP and the group are taken down


if __name__ == "__main__":
    main()
