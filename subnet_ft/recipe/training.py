"""Checks the `training` section: the TRL config's own fields, which are known only to the training layer.

The training layer injects them as `algorithms`; without that table names are not checked, but fields that the recipe
sets itself, and numbers out of their range, are still refused. What the config refuses by itself is found by the
training layer's `config_problems`.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Annotated, Any

from subnet_ft.recipe.algorithms import ALGORITHMS, learns_from
from subnet_ft.recipe.parsing import Parser, did_you_mean, show
from subnet_ft.recipe.ranges import Count, CountOrZero, Range

_RANGES: dict[str, Any] = {
    "learning_rate": Annotated[float, Range(least=0.0)],
    "weight_decay": Annotated[float, Range(least=0.0)],
    "adam_beta1": Annotated[float, Range(least=0.0, below=1.0)],
    "adam_beta2": Annotated[float, Range(least=0.0, below=1.0)],
    "adam_epsilon": Annotated[float, Range(above=0.0)],
    "max_grad_norm": Annotated[float, Range(least=0.0)],
    "warmup_steps": Annotated[float, Range(least=0.0)],
    "num_train_epochs": Annotated[float, Range(above=0.0)],
    "max_steps": Annotated[int, Range(least=-1)],
    "per_device_train_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "num_generations": Annotated[int, Range(least=2)],
    "num_iterations": Count,
    "max_length": Count | None,
    "max_completion_length": Count,
    "temperature": Annotated[float, Range(above=0.0)],
    "top_p": Annotated[float, Range(above=0.0, most=1.0)],
    "top_k": CountOrZero,
    "min_p": Annotated[float, Range(least=0.0, most=1.0)] | None,
    "repetition_penalty": Annotated[float, Range(above=0.0)],
    "steps_per_generation": Count | None,
    "generation_batch_size": Count | None,
    "beta": Annotated[float, Range(least=0.0)],
    "epsilon": Annotated[float, Range(above=0.0)],
    "epsilon_high": Annotated[float, Range(above=0.0)] | None,
    "label_smoothing": Annotated[float, Range(least=0.0, below=0.5)],
    "simpo_gamma": Annotated[float, Range(least=0.0)],
    "gamma": Annotated[float, Range(least=0.0, most=1.0)],
    "lam": Annotated[float, Range(least=0.0, most=1.0)],
    "kl_coef": Annotated[float, Range(least=0.0)],
    "vf_coef": Annotated[float, Range(above=0.0)],
    "cliprange_value": Annotated[float, Range(above=0.0)] | None,
    "value_learning_rate": Annotated[float, Range(least=0.0)],
    "value_max_grad_norm": Annotated[float, Range(above=0.0)] | None,
    "missing_eos_penalty": Annotated[float, Range(least=0.0)],
    "prm_learning_rate": Annotated[float, Range(least=0.0)],
    "prm_beta": Annotated[float, Range(above=0.0)],
    "prm_weight_decay": Annotated[float, Range(least=0.0)],
    "prm_max_grad_norm": Annotated[float, Range(above=0.0)],
    "outcome_coef": Annotated[float, Range(least=0.0)],
    "process_coef": Annotated[float, Range(least=0.0)],
    "accuracy_low": Annotated[float, Range(least=0.0, most=1.0)],
    "accuracy_high": Annotated[float, Range(least=0.0, most=1.0)],
    "rationale_weight": Annotated[float, Range(least=0.0)],
    "desirable_weight": Annotated[float, Range(least=0.0)],
    "undesirable_weight": Annotated[float, Range(least=0.0)],
    "logging_steps": Annotated[float, Range(above=0.0)],
    "save_steps": Annotated[float, Range(above=0.0)],
    "save_total_limit": CountOrZero | None,
}

_OPTIMIZER = "the masked optimizer replaces it; choose one under `subnet.optimizer`"
_PEFT = "PEFT trains added weights, a subnetwork is a part of the model's own; remove it"
_MODEL = "the model is loaded from `model`; set `model.dtype` or `model.attn_implementation` there"
_TEACHER = "the teacher is loaded from `teacher` at the top level; set `teacher.name` and `teacher.revision` there"
_REFUSED: dict[str, str] = {
    "output_dir": "every stage has its own folder; set `output` at the top level of the recipe",
    "seed": "one seed serves all runs; set `seed` at the top level of the recipe",
    "resume_from_checkpoint": "an interrupted run resumes by itself; start the same command again",
    "optim": _OPTIMIZER,
    "optim_args": _OPTIMIZER,
    "optim_target_modules": _OPTIMIZER,
    "model_init_kwargs": _MODEL,
    "dtype": _MODEL,
    "torch_dtype": _MODEL,
    "teacher_model_name_or_path": _TEACHER,
    "teacher_model_revision": _TEACHER,
    "teacher_model_init_kwargs": _TEACHER,
    "peft": _PEFT,
    "peft_config": _PEFT,
    "use_peft": _PEFT,
    "lora_r": _PEFT,
    "lora_alpha": _PEFT,
    "lora_target_modules": _PEFT,
}
_SHARDED = "shards have no mask per tensor, and this release trains in one process; remove it"
_TOKENIZER = "the base is asked with its own tokenizer and chat template, and so are the trained models"
_EVALUATION = "the trainer gets no evaluation set; trained models are judged by `evaluation` at the top level"
_REFUSED_WHEN_SET: dict[str, str] = {
    "bf16": "the weights already are in `model.dtype`; mixed precision would upcast what is trained to fp32",
    "fp16": "fp16 mixed precision needs a GradScaler, which cannot see compact gradients; use `model.dtype: bfloat16`",
    "cast_lm_head_to_fp32": (
        "it would train and save the output embedding in float32, and weights are compared with the base's in "
        "`model.dtype`; use `model.dtype: float32` for the whole model"
    ),
    "ignore_data_skip": "an interrupted run would see its first data again when it resumes",
    "deepspeed": "ZeRO flattens parameters, so that no mask per tensor remains; this release trains in one process",
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "save_only_model": "a resumed run would start with an empty optimizer state, and end in other weights; remove it",
    "eval_strategy": _EVALUATION,
    "eval_on_start": _EVALUATION,
    "load_best_model_at_end": _EVALUATION,
    "generate_during_eval": _EVALUATION,
    "chat_template_path": _TOKENIZER,
    "eos_token": _TOKENIZER,
}
_REFUSED_WITH_PROMPTS: dict[str, str] = {
    "remove_unused_columns": "it would remove the column from which rewards find a prompt's example; remove it",
}
_OFF = {"eval_strategy": "no"}
"""What else than null, false or nothing leaves a setting of the tables above as it is."""


def check_training(
    parser: Parser, training: Mapping[str, Any], algorithm: str, fields: Mapping[str, Any] | None
) -> None:
    """Report every key of `training` that the recipe or the algorithm's config refuses.

    Args:
        parser: Collects the problems.
        training: The section as written.
        algorithm: Named in messages.
        fields: Field name to its type or default, or `None` when they are not known.
    """
    known = ALGORITHMS.get(algorithm)
    ranges = _RANGES if known is None else {**_RANGES, **known.ranges}
    for name, value in training.items():
        key = f"training.{name}"
        refusal = _refusal(name, value, algorithm)
        if refusal is not None:
            parser.report(key, f"not allowed here, got {show(value)}: {refusal}")
        elif fields is not None and name not in fields:
            hint = did_you_mean(name, [field for field in fields if field not in _REFUSED])
            parser.report(key, f"unknown key{hint or f'; `{algorithm}` has no such setting'}")
        elif name == "max_grad_norm" and value is None:
            parser.report(key, "must be a number, got null; 0 switches clipping off")
        elif known is not None and name in known.fixed:
            if value != known.fixed[name]:
                fixed = f"{show(known.fixed[name])} makes it `{algorithm}`; remove it, or choose another algorithm"
                parser.report(key, f"not allowed here, got {show(value)}: {fixed}")
        elif name in ranges:
            parser.check(key, value, ranges[name])
        elif fields is not None:
            parser.check(key, value, _annotation(fields[name]))
    if parser.is_usable("training.max_steps") and training.get("max_steps") == 0:
        parser.report("training.max_steps", "must be >= 1, or -1 to train for `num_train_epochs`, got 0")


def _refusal(name: str, value: Any, algorithm: str) -> str | None:
    if name in _REFUSED:
        return _REFUSED[name]
    if not value or value == _OFF.get(name):
        return None
    if name in _REFUSED_WITH_PROMPTS and learns_from(algorithm) == "prompts":
        return _REFUSED_WITH_PROMPTS[name]
    return _REFUSED_WHEN_SET.get(name)


def _annotation(field: Any) -> Any:
    """Return the type that a field's type or default asks for; a default of `None` says nothing."""
    if isinstance(field, type) or typing.get_origin(field) is not None or field is Any:
        return field
    if field is None:
        return Any
    return int | float if type(field) is int else type(field)
