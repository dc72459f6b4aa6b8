"""One training run: a recipe's trainer, restricted to a mask, from the base to a saved checkpoint."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.checkpoints.models import load_model, save_model
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW, memory_ledger
from subnet_ft.training.algorithms import ALGORITHMS, build_config
from subnet_ft.training.peak_memory import PeakMemory
from subnet_ft.training.restrict import restrict

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from subnet_ft.recipe import Recipe
    from subnet_ft.tasks import Task

logger = logging.getLogger(__name__)

TRAINER = "trainer"
"""What the trainer writes by itself: checkpoints to resume from, and the logs of `report_to`."""
LOG = "log.json"


@dataclass(frozen=True)
class TrainingRun:
    """What a finished run measured.

    Args:
        log_history: The trainer's log, one dict per logged step.
        seconds: Wall time of training; a resumed run counts only its last part.
        resumed_from: The trainer checkpoint it continued from, if any.
        memory: Bytes by component: weights, gradients, moments, masters, mask, and `peak_rss` or `peak_device`.
        num_steps: Optimizer steps taken in all.
    """

    log_history: list[dict[str, Any]]
    seconds: float
    resumed_from: str | None
    memory: dict[str, int]
    num_steps: int


def full_mask(model: PreTrainedModel) -> SubnetMask:
    """Return the mask of the full run: every weight of `model` trainable."""
    return SubnetMask.full({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})


def train(
    recipe: Recipe,
    *,
    base: Path,
    folder: Path,
    mask: SubnetMask | None,
    dataset: Dataset,
    task: Task | None,
    progress: bool = False,
) -> TrainingRun:
    """Train from `base` and save an ordinary checkpoint in `folder`.

    An interrupted run continues from its newest trainer checkpoint in `folder/trainer`.

    Args:
        recipe: Algorithm, hyper-parameters, optimizer and seed.
        base: Folder of the base checkpoint.
        folder: Where the tuned checkpoint, its tokenizer and its log go.
        mask: The subnetwork; `None` trains everything, through the same code.
        dataset: Prompts or preferences, in the format of the algorithm's trainer.
        task: Scores completions, for algorithms that sample; `None` for the others.
        progress: Show a bar on stderr.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from subnet_ft.training.progress import show_progress

    spec = recipe.model
    model, tokenizer = load_model(base, dtype=spec.dtype, attn_implementation=spec.attn_implementation)
    trainer = _build_trainer(recipe, model, tokenizer, folder, dataset, task)
    show_progress(trainer, progress=progress)
    restrict(trainer, full_mask(model) if mask is None else mask, master=recipe.subnet.optimizer.master)

    checkpoints = folder / TRAINER
    last: str | None = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None  # type: ignore[no-untyped-call]
    if last is not None:
        logger.info("resuming from %s", last)
    with PeakMemory() as peak:
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=last)
        seconds = time.perf_counter() - start
    # accelerate wraps the optimizer; the masked one is inside.
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, MaskedAdamW)
    save_model(model, tokenizer, folder)
    log_history = list(trainer.state.log_history)
    (folder / LOG).write_text(json.dumps(log_history, indent=1) + "\n")
    return TrainingRun(
        log_history=log_history,
        seconds=seconds,
        resumed_from=None if last is None else Path(last).name,
        memory={**memory_ledger(model, optimizer), **peak.measured},
        num_steps=trainer.state.global_step,
    )


def remove_checkpoints(folder: Path) -> None:
    """Remove the trainer checkpoints of a finished run; the logs of `report_to` stay."""
    for path in (folder / TRAINER).glob("checkpoint-*"):
        shutil.rmtree(path)


def _build_trainer(
    recipe: Recipe, model: PreTrainedModel, tokenizer: Any, folder: Path, dataset: Dataset, task: Task | None
) -> Any:
    algorithm = ALGORITHMS[recipe.algorithm]
    args = build_config(
        algorithm,
        {
            "save_strategy": "steps" if "save_steps" in recipe.training else "no",
            "bf16": False,  # the weights already are in the recipe's dtype; mixed precision would add casts
            "report_to": "none",
            "dataloader_pin_memory": torch.cuda.is_available(),
            **recipe.training,
            "output_dir": str(folder / TRAINER),
            "seed": recipe.seed,
        },
    )
    options: dict[str, Any] = {}
    if task is not None:
        from subnet_ft.tasks import reward_functions

        options["reward_funcs"] = reward_functions(task, recipe.task)
    return algorithm.trainer_class(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, **options)
