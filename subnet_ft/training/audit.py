"""An audit that can be left on: weights outside the mask are compared bit by bit while training goes on."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subnet_ft.errors import FrozenWeightError
from subnet_ft.masks import by_canonical_name
from subnet_ft.optim import MaskedBase, check_replicas
from subnet_ft.optim.processes import communication_device, num_processes
from subnet_ft.training.resume import read_manifest
from subnet_ft.training.saving import MANIFEST
from subnet_ft.training.unwrap import unwrapped

logger = logging.getLogger(__name__)


class FrozenWeightAudit(TrainerCallback):
    """Compares the weights outside the mask with those at the start, every `steps` steps and at the end.

    A weight that changed stops the run with the name of its tensor. Where processes hold replicas, all weights of all
    processes are compared as well. An audit is one pass over the weights of the model, two with replicas; what they
    cost so far is in `num_audits` and `seconds`.

    Args:
        steps: Steps from one audit to the next, >= 1.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"`steps` must be >= 1, got {steps}")
        self.steps = steps
        self.num_audits = 0
        self.seconds = 0.0
        self._last = -1  # step of the last audit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the fingerprints that every later audit compares with; a resumed run has those of its start."""
        self._audit(unwrapped(kwargs["optimizer"]), state.global_step, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Audit every `steps` steps and after the last, before anything of that step is saved."""
        if state.global_step % self.steps == 0 or state.global_step >= state.max_steps:
            self._audit(unwrapped(kwargs["optimizer"]), state.global_step, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit what training leaves, and say what the audits cost."""
        optimizer = unwrapped(kwargs["optimizer"])
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if (best is not None or self._last != state.global_step) and _fits(best, optimizer):
            self._audit(optimizer, state.global_step, kwargs["model"])
        logger.info("%d audits of the weights outside the mask passed in %.2f s", self.num_audits, self.seconds)

    def _audit(self, optimizer: MaskedBase, step: int, model: torch.nn.Module) -> None:
        start = time.perf_counter()
        _audit_together(optimizer)
        check_replicas(by_canonical_name(model.named_parameters()))
        self.seconds += time.perf_counter() - start
        self.num_audits += 1
        self._last = step


def _audit_together(optimizer: MaskedBase) -> None:
    """Audit in every process, and end in all where one finds a change; none waits for another in vain."""
    found: FrozenWeightError | None = None
    try:
        optimizer.audit()
    except FrozenWeightError as error:
        found = error
    if num_processes() > 1:
        failed = torch.tensor(int(found is not None), device=communication_device())
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if found is None and int(failed):
            raise FrozenWeightError(
                "Weights outside the mask changed in another process, whose message names the tensor; not in this one."
            )
    if found is not None:
        raise found


def _fits(best: str | None, optimizer: MaskedBase) -> bool:
    """Whether what was loaded at the end was trained under the optimizer's mask, not an earlier one of a schedule."""
    if best is None or not (Path(best) / MANIFEST).is_file():  # a trainer that is not restricted has one mask
        return True
    return bool(read_manifest(Path(best))["mask_fingerprint"] == optimizer.mask.fingerprint)
