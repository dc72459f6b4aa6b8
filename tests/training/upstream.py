"""The upstream functions that are overridden here, or called although they are private or have changed before.

A guard that fails names the package and its version, what it has now, what was expected, and the file of ours that must
follow.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

MIXIN = "subnet_ft/training/mixin.py"
CHECKPOINTS = "subnet_ft/training/checkpoint_mixin.py"
SAVING = "subnet_ft/training/saving.py"
ROLLOUTS = "subnet_ft/training/sidecar.py"
RESUME = "subnet_ft/training/resume.py"
OPTIMIZER = "subnet_ft/optim/base.py"
PRIME = "subnet_ft/training/prime/trainer.py"
PPO = "subnet_ft/training/ppo/trainer.py"
STEP_BY_STEP = "subnet_ft/training/step_by_step/trainer.py"
SYNC = "subnet_ft/training/weight_sync/sync.py"


@dataclass(frozen=True)
class Taken:
    """One upstream function and how it is relied upon.

    Args:
        where: `module:path`.
        takes: Its parameters, with their defaults; `...` at the end stands for any others that have a default, `*` for
            any parameters at all. Several forms that all fit are separated by ` | `.
        used_by: The file of ours that overrides or calls it.
    """

    where: str
    takes: str
    used_by: str


OVERRIDDEN = {
    name: Taken(f"transformers:Trainer.{name}", takes, used_by)
    for name, takes, used_by in (
        ("create_optimizer", "self, model=None", MIXIN),
        ("create_scheduler", "self, num_training_steps, optimizer=None", MIXIN),
        ("log", "self, logs, start_time=None", MIXIN),
        ("_clip_grad_norm", "self, model", MIXIN),
        ("_get_grad_norm", "self, model, grad_norm=None", MIXIN),
        ("train", "self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None", CHECKPOINTS),
        ("_get_train_sampler", "self, train_dataset=None | self, dataset=None", CHECKPOINTS),  # the second in TRL
        ("_get_output_dir", "self, trial", CHECKPOINTS),
        ("_push_from_checkpoint", "self, checkpoint_folder", CHECKPOINTS),
        ("_save_checkpoint", "self, model, trial", CHECKPOINTS),
        ("_save_optimizer_and_scheduler", "self, output_dir", CHECKPOINTS),
        ("_save", "self, output_dir=None, state_dict=None", CHECKPOINTS),
        ("_load_optimizer_and_scheduler", "self, checkpoint", CHECKPOINTS),
        ("_load_from_checkpoint", "self, resume_from_checkpoint, model=None", CHECKPOINTS),
        ("_load_best_model", "self", CHECKPOINTS),
        ("_run_epoch", "*", CHECKPOINTS),  # passed on as it comes
    )
}

TAKEN = [
    *OVERRIDDEN.values(),
    Taken("transformers:TrainerState.save_to_json", "self, json_path, ...", CHECKPOINTS),
    Taken("accelerate:Accelerator.wait_for_everyone", "self, ...", CHECKPOINTS),
    Taken("accelerate:Accelerator.unwrap_model", "self, model, ...", CHECKPOINTS),
    Taken(
        "transformers.trainer_utils:sort_checkpoints",
        "output_dir, checkpoint_prefix='checkpoint', use_mtime=False, ...",
        SAVING,
    ),
    Taken("transformers:Trainer.get_decay_parameter_names", "self, model", "subnet_ft/training/build_optimizer.py"),
    Taken(
        "transformers:Trainer.get_optimizer_cls_and_kwargs", "args, model=None, ...", "subnet_ft/training/options.py"
    ),
    Taken(
        "transformers.integrations:get_reporting_integration_callbacks",
        "report_to, ...",
        "subnet_ft/training/config_check.py",
    ),
    Taken("transformers:Trainer.remove_callback", "self, callback", "subnet_ft/training/progress.py"),
    Taken("transformers:DynamicCache.batch_repeat_interleave", "self, repeats", "subnet_ft/tasks/generation.py"),
    Taken("transformers.utils.logging:is_progress_bar_enabled", "", "subnet_ft/checkpoints/models.py"),
    Taken("transformers.utils.logging:disable_progress_bar", "", "subnet_ft/checkpoints/models.py"),
    Taken("transformers.utils.logging:enable_progress_bar", "", "subnet_ft/checkpoints/models.py"),
    Taken("accelerate.optimizer:AcceleratedOptimizer.step", "self, closure=None", OPTIMIZER),
    Taken("accelerate.optimizer:AcceleratedOptimizer.zero_grad", "self, set_to_none=None", OPTIMIZER),
    Taken("torch.optim:Optimizer.state_dict", "self", OPTIMIZER),
    Taken("torch.optim:Optimizer.load_state_dict", "self, state_dict", OPTIMIZER),
    Taken("torch.optim:Optimizer.zero_grad", "self, set_to_none=True", OPTIMIZER),
    Taken("torch.optim:Optimizer.add_param_group", "self, param_group", OPTIMIZER),
    Taken("torch.autograd.graph:increment_version", "tensor", OPTIMIZER),
    Taken("torch:Tensor.register_post_accumulate_grad_hook", "self, hook", "subnet_ft/optim/gradients.py"),
    Taken("trl.generation.vllm_generation:VLLMGeneration._iter_named_params", "self", SYNC),
    Taken("trl.generation.vllm_client:VLLMClient.update_named_params", "self, metadata, named_params", SYNC),
    Taken("trl:GRPOTrainer._calculate_rewards", "self, inputs, prompts, completions, completion_ids_list", PRIME),
    Taken("trl:GRPOTrainer._generate_and_score_completions", "self, inputs", PRIME),
    Taken("trl.trainer.utils:create_model_from_path", "model_id, architecture=None, ...", PRIME),
    Taken(
        "trl.trainer.sft_trainer:SFTTrainer.compute_loss",
        "self, model, inputs, return_outputs=False, num_items_in_batch=None",
        STEP_BY_STEP,
    ),
    Taken("transformers:Trainer.get_batch_samples", "self, epoch_iterator, num_batches, device", STEP_BY_STEP),
    *(
        Taken(f"trl.trainer.grpo_trainer:GRPOTrainer.{name}", takes, PPO)
        for name, takes in (
            ("_calculate_rewards", "self, inputs, prompts, completions, completion_ids_list"),
            ("_generate_and_score_completions", "self, inputs"),
            ("_compute_loss", "self, model, inputs"),
            (
                "_get_per_token_logps_and_entropies",
                # the second in TRL 1.14, which passes `args` and `kwargs` on
                "self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, ... | "
                "self, model, args, batch_size=None, ...",
            ),
        )
    ),
]


def differs(where: str, what: str, used_by: str) -> str:
    """Compose the message of a failure: who changed, what, and what to do."""
    package = where.partition(":")[0].partition(".")[0]
    return (
        f"{package} {importlib.metadata.version(package)}: `{where.replace(':', '.')}` {what}. `{used_by}` relies on "
        "it: read the new source, make that file right for every version that pyproject.toml allows, then mend this "
        f"test; or exclude this version of {package} there."
    )


def takes(function: Callable[..., Any]) -> str:
    """Write a function's parameters with their defaults."""
    return ", ".join(
        parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"
        for parameter in inspect.signature(function).parameters.values()
    )


def problem(taken: Taken, function: Callable[..., Any] | None = None) -> str | None:
    """Return what is wrong with a row of the table, or with a `function` that stands for it; `None` if nothing is."""
    module, _, path = taken.where.partition(":")
    if function is None:
        try:
            function = attrgetter(path)(importlib.import_module(module))
        except (ImportError, AttributeError):
            return differs(taken.where, "is gone", taken.used_by)
    found = takes(function)
    if any(_fits(found, form) for form in taken.takes.split(" | ")):
        return None
    return differs(taken.where, f"takes ({found}), expected ({taken.takes})", taken.used_by)


def _fits(found: str, form: str) -> bool:
    if not form.endswith("..."):
        return form in ("*", found)
    leading = form.removesuffix("...").removesuffix(", ")
    rest = found.removeprefix(leading).removeprefix(", ")
    return found.startswith(leading) and all("=" in part or part == "kwargs" for part in rest.split(", ") if part)


def override_problems(trainer_class: type, base: type) -> list[str]:
    """Return what is wrong with the methods of the table that `trainer_class` and its parents below `base` override.

    They stand between `base` and us: they must take what we pass on, and call the method that they override.
    """
    problems = []
    for owner in trainer_class.__mro__[: trainer_class.__mro__.index(base)]:
        for name in OVERRIDDEN.keys() & vars(owner).keys():
            method = vars(owner)[name]
            here = Taken(
                f"{owner.__module__}:{owner.__name__}.{name}", OVERRIDDEN[name].takes, OVERRIDDEN[name].used_by
            )
            found = problem(here, method)
            # A sampler is built anew; everything else is added to what `Trainer` does.
            if found is None and name != "_get_train_sampler" and f"super().{name}(" not in inspect.getsource(method):
                found = differs(here.where, f"never calls `super().{name}`", here.used_by)
            problems += [found] if found else []
    return problems


def expect(found: object, expected: object, where: str, used_by: str) -> None:
    """Assert equality with a message that says whose behaviour changed and which file of ours must follow."""
    assert found == expected, differs(where, f"does {found}, expected {expected}", used_by)
