"""One training run: a recipe's trainer, restricted to a mask, from the base to a saved checkpoint."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.listing import listing
from subnet_ft.checkpoints.models import load_model, save_model, undo_upcasts
from subnet_ft.checkpoints.quantized import weight_bytes
from subnet_ft.errors import CheckpointError, TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.methods.adapters import adapter_mask, attach
from subnet_ft.methods.masks import method_mask
from subnet_ft.methods.saved import save_adapter
from subnet_ft.optim import memory_ledger
from subnet_ft.processes import first_alone, gathered, is_first
from subnet_ft.recipe.methods import METHODS, Method, training_of
from subnet_ft.recipe.schema import MethodSpec
from subnet_ft.training.adapters import index_nbytes, left_as_built, prompt_texts
from subnet_ft.training.algorithms import ALGORITHMS, run_config
from subnet_ft.training.delta_checkpoints import check_held_by_delta
from subnet_ft.training.dynamics import DYNAMICS, TrainingDynamics
from subnet_ft.training.launch_check import check_trainer_joined
from subnet_ft.training.peak_memory import PeakMemory
from subnet_ft.training.reference import hold_quantized, memory_beside, references
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

# transformers' names of the optimizers of `subnet.optimizer.name`.
_OPTIM = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit", "sgd": "sgd"}


@dataclass(frozen=True)
class TrainingRun:
    """What a finished run measured.

    Args:
        log_history: The trainer's log, one dict per logged step.
        seconds: Wall time of training; a resumed run counts only its last part.
        resumed_from: The trainer checkpoint it continued from, if any.
        memory: Bytes by component: weights, gradients, moments, masters, mask, the trainer's reference model if it
            holds one, what it trains beside the policy, and `peak_rss` or `peak_device`. Of several processes each
            component is that of the one that holds most of it.
        num_steps: Optimizer steps taken in all.
        num_trainable: Weights that train: of the mask, or of the adapter.
        num_parameters: Weights of the model, those of an adapter included.
        step_seconds: Median wall time of an optimizer step, generation included; 0.0 when a finished run was resumed.
    """

    log_history: list[dict[str, Any]]
    seconds: float
    resumed_from: str | None
    memory: dict[str, int]
    num_steps: int
    num_trainable: int
    num_parameters: int
    step_seconds: float


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
    teacher: Path | None = None,
    method: str = "full",
    stop_after: int | None = None,
    progress: bool = False,
) -> TrainingRun:
    """Train from `base`, and save in `folder` an ordinary checkpoint, or the adapter of a method that trains one.

    An interrupted run continues from its newest trainer checkpoint in `folder/trainer`. The processes of a launch train
    together, and the first writes.

    Args:
        recipe: Algorithm, hyper-parameters, optimizer and seed.
        base: Folder of the base checkpoint.
        folder: Where the tuned checkpoint, its tokenizer and its log go.
        mask: The subnetwork; `None` trains what `method` says, through the same code.
        dataset: What the algorithm learns from, in the format of its trainer.
        task: Scores completions, for algorithms that need rewards; `None` for the others.
        teacher: Folder of the teacher's checkpoint, for algorithms that need one.
        method: A name in `METHODS`, whose settings in the recipe apply.
        stop_after: Stop after this step of the schedule, and leave the trainer's checkpoint of it, with the optimizer's
            state, in `folder/trainer`.
        progress: Show a bar on stderr.

    Raises:
        CheckpointError: Weights of the base have another dtype than the recipe's once they are loaded, or the teacher
            has another vocabulary.
        MethodError: The method cannot train this model.
        TrainerError: There is less data than one batch, or than `stop_after` steps.
    """
    from subnet_ft.training.progress import show_progress
    from subnet_ft.training.resume import NoSaveAtTheEnd, StopAfter, remove_checkpoints
    from subnet_ft.training.step_times import StepTimes

    spec = recipe.model
    loaded, tokenizer = load_model(
        base,
        dtype=spec.dtype,
        attn_implementation=spec.attn_implementation,
        kind=ALGORITHMS[recipe.algorithm].model_kind,
        quantization=METHODS[method].quantization,
    )
    # All weights are trained, saved and compared in one dtype.
    undo_upcasts(loaded, dtype=spec.dtype)
    _refuse_other_dtypes(loaded, base, spec.dtype)
    model: Any = loaded
    settings = recipe.methods.get(method, MethodSpec())
    is_adapter = METHODS[method].trains == "adapter"
    if recipe.subnet.save_only_delta and not is_adapter:  # in the full run, too: hours before the subnetwork run asks
        check_held_by_delta(loaded)
    if is_adapter:
        texts = prompt_texts(dataset, tokenizer) if method == "eva" else []
        model = attach(model, tokenizer, method, settings.config, seed=recipe.seed, texts=texts)
        mask = adapter_mask(model)
    elif mask is None:
        mask = full_mask(model) if METHODS[method].config is None else _mask_of(recipe, method, base)
    trainer = _build_trainer(recipe, METHODS[method], model, tokenizer, base, folder, dataset, task, teacher)
    check_trainer_joined(trainer)
    if stop_after is None:
        trainer.add_callback(NoSaveAtTheEnd())
    else:
        trainer.add_callback(StopAfter(stop_after))
        # A run that was killed after its last save would go on beyond it.
        first_alone("steps beyond the probe", lambda: remove_checkpoints(folder / TRAINER, since=stop_after))
    times = StepTimes()
    trainer.add_callback(times)
    every = recipe.evidence.dynamics_steps
    if every is not None and stop_after is None and not is_adapter:
        # The bitmaps go with the checkpoints: until then the run may have to resume.
        trainer.add_callback(TrainingDynamics(base, every, file=folder / DYNAMICS, keep_bitmaps=True))
    show_progress(trainer, progress=progress)
    restrict(
        trainer,
        mask,
        # The weights of an adapter are float32 already; what is left of bfloat16 completes none of them.
        master="fp32" if is_adapter else recipe.subnet.optimizer.master,
        clip_norm=recipe.subnet.optimizer.clip_norm,
        nonfinite=recipe.subnet.optimizer.nonfinite,
        audit_steps=recipe.subnet.audit_steps,
        log_norms=recipe.subnet.log_norms,
        # A full run has nothing to spare: every weight would be held. Its losses are the same either way.
        free_reference=recipe.reference.source == "policy" and mask.density < 1.0,
        # So has its checkpoint: with a bit more per weight it would be larger than the dense one.
        save_only_delta=recipe.subnet.save_only_delta and mask.density < 1.0 and not is_adapter,
        save_total_bytes=recipe.subnet.save_total_bytes,
    )

    last = _resumes_from(folder / TRAINER)
    if last is not None:
        logger.info("resuming from %s", last)
    with PeakMemory() as peak:
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        seconds = time.perf_counter() - start
    if trainer.state.global_step == 0:
        raise TrainerError(
            f"Not one step was trained: {len(dataset)} rows give no batch. Ask for more data (`task.num_train`, "
            "`task.pairs`), or lower `training.per_device_train_batch_size`."
        )
    if stop_after is not None and trainer.state.global_step < stop_after:
        raise TrainerError(
            f"Training ended after {trainer.state.global_step} steps, and its first {stop_after} were asked for. Ask "
            "for fewer (`subnet.source.steps`), or train for longer (`training.max_steps`, `task.num_train`)."
        )
    weights = _gathered_weights(trainer)
    log_history = list(trainer.state.log_history)
    if is_first():
        if is_adapter:
            save_adapter(model, tokenizer, folder, method=method, base=base, base_name=spec.name)
        else:
            save_model(model, tokenizer, folder, state_dict=weights)
        (folder / LOG).write_text(json.dumps(log_history, indent=1) + "\n")
    memory = memory_ledger(model, trainer.masked_optimizer)
    if is_adapter:
        memory["weights"] = weight_bytes(model)
        memory["mask"] += index_nbytes(model)
    return TrainingRun(
        log_history=log_history,
        seconds=seconds,
        resumed_from=None if last is None else last.name,
        memory=_largest({**memory, **memory_beside(trainer, ALGORITHMS[recipe.algorithm]), **peak.measured}),
        num_steps=trainer.state.global_step,
        num_trainable=mask.num_trainable,
        num_parameters=_num_parameters(base, mask) if is_adapter else mask.num_parameters,
        step_seconds=times.median,
    )


def _resumes_from(folder: Path) -> Path | None:
    """Return the newest whole trainer checkpoint, which the first process looks for; all take the same."""
    from subnet_ft.training.resume import newest_complete

    def find() -> str | None:
        found = newest_complete(folder)
        return None if found is None else found.name

    name = first_alone("checkpoint to resume from", find)
    return None if name is None else folder / name


def _gathered_weights(trainer: Any) -> dict[str, torch.Tensor] | None:
    """Return all weights of a model that lies in parts on several processes, in the first; `None` where it is whole."""
    if not trainer.is_fsdp_enabled:
        return None
    state: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    once, all_names = ({name for name, _ in trainer.model.named_parameters(remove_duplicate=d)} for d in (True, False))
    return {name: weight for name, weight in state.items() if name not in all_names - once}  # a tied weight once


def _largest(memory: dict[str, int]) -> dict[str, int]:
    """Return each component as the process has it that holds most of it."""
    found = gathered("memory", memory)
    return {name: max(of_one.get(name, 0) for of_one in found) for name in memory}


def _num_parameters(base: Path, mask: SubnetMask) -> int:
    """Count the weights of a base, two of which may lie in one byte, and of the adapter on it."""
    return sum(math.prod(spec.shape) for spec in open_checkpoint(base).specs.values()) + mask.num_trainable


def _mask_of(recipe: Recipe, method: str, base: Path) -> SubnetMask:
    """Return the mask of a method that follows from the base, as its weights are when they are trained."""
    checkpoint = open_checkpoint(base)
    stored = {str(spec.dtype).removeprefix("torch.") for spec in checkpoint.specs.values()}
    dtype = None if stored == {recipe.model.dtype} else recipe.model.dtype
    return method_mask(method, checkpoint, recipe.methods.get(method, MethodSpec()).config, dtype=dtype)


def _refuse_other_dtypes(model: PreTrainedModel, base: Path, dtype: str) -> None:
    floats = [(name, weight) for name, weight in model.named_parameters() if weight.is_floating_point()]
    others = [name for name, weight in floats if str(weight.dtype) != f"torch.{dtype}"]
    if others:
        raise CheckpointError(
            f"`{base}` stores weights more precisely than `model.dtype: {dtype}`, and transformers does not round "
            f"them: {listing(others)}. A mask is compared in one dtype, so no subnetwork run could follow. Set "
            f"`model.dtype` to float32, or round the base: load it, call `model.to(torch.{dtype})`, save it with "
            "`save_pretrained`, and use that folder."
        )


def _build_trainer(
    recipe: Recipe,
    method: Method,
    model: Any,
    tokenizer: Any,
    base: Path,
    folder: Path,
    dataset: Dataset,
    task: Task | None,
    teacher: Path | None,
) -> Any:
    algorithm = ALGORITHMS[recipe.algorithm]
    args = run_config(
        algorithm,
        training_of(recipe, method.name),
        output_dir=str(folder / TRAINER),
        seed=recipe.seed,
        optim=_OPTIM[recipe.subnet.optimizer.name],
    )
    options: dict[str, Any] = {}
    if task is not None:
        from subnet_ft.tasks import reward_functions

        options["reward_funcs"] = reward_functions(task, recipe.task)
    if teacher is not None and algorithm.judge == "teacher":
        options["teacher_model"] = _load_teacher(recipe, teacher, tokenizer)
    if algorithm.adds_bos:
        tokenizer = _without_bos(tokenizer, dataset)
    guard: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if method.trains == "adapter":
        guard = left_as_built(model, method, algorithm.trainer_class.__name__)
    with guard:
        trainer = algorithm.trainer_class(
            model=model, args=args, train_dataset=dataset, processing_class=tokenizer, **options
        )
    for reference in references(trainer, algorithm):
        # The reference is the base as the policy started from it; TRL before 1.16 loads it in float32.
        if reference.dtype != model.dtype:
            reference.to(model.dtype)
        undo_upcasts(reference, dtype=recipe.model.dtype)
        if recipe.reference.quantization is not None:
            hold_quantized(reference, base, recipe)
    return trainer


def _load_teacher(recipe: Recipe, folder: Path, tokenizer: Any) -> PreTrainedModel:
    spec = recipe.teacher or recipe.model
    model, own = load_model(folder, dtype=spec.dtype, attn_implementation=spec.attn_implementation)
    if own.get_vocab() != tokenizer.get_vocab():
        raise CheckpointError(
            f"The teacher in `{folder}` has another vocabulary than `{recipe.model.name}`: {len(own)} and "
            f"{len(tokenizer)} tokens, and not the same ones. Distillation compares the two token by token; choose a "
            "`teacher` with the tokenizer of `model`."
        )
    return model


def _without_bos(tokenizer: Any, dataset: Dataset) -> Any:
    """Return a tokenizer without BOS token where text prompts have none when the model is sampled and judged."""
    if not isinstance(dataset[0].get("prompt", ""), str) or tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    return tokenizer
