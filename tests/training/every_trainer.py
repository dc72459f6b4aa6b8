"""One builder for every trainer of the table in `docs/trainers.md`: tiny models, local data, a few steps, offline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from helpers import QUIET
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer

from subnet_ft.checkpoints.tiny import tiny_config, tiny_model, tiny_tokenizer
from subnet_ft.training.algorithms import Algorithm, build_config

ROWS = 12
BATCH = 4
"""So an epoch is three steps, and runs of four or more cross its end."""


def build(name: str, folder: Path, *, model: PreTrainedModel | None = None, **options: Any) -> Trainer:
    """Build the trainer `name` on the tiny llama; the same options give the same run, bit by bit.

    What TRL would switch on by itself, mixed precision and activation checkpointing, is off unless `options` say so.

    Args:
        name: A key of `TRAINERS`.
        folder: The trainer's `output_dir`.
        model: Trained instead of a fresh `base_model(name)`.
        **options: Fields of the trainer's config that replace the common ones.
    """
    kind = TRAINERS[name]
    known = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "bf16": False,
        "activation_checkpointing": False,
        **QUIET,
        **kind.options,
        **options,
    }
    algorithm = Algorithm(name, kind.trainer, kind.config)
    wanted: Any = base_model(name) if model is None else model
    if name in ("GRPO", "RLOO"):
        # They load the reference model from where the policy came from.
        wanted.config._name_or_path = str(folder / "base")
        wanted.save_pretrained(folder / "base")
    # Older releases of transformers and TRL get the options by their older names.
    args = build_config(algorithm, known)
    trainer: Trainer = algorithm.trainer_class(model=wanted, args=args, train_dataset=kind.data(), **kind.arguments())
    return trainer


def base_model(name: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Build the model that the trainer `name` trains: the tiny llama, for rewards with a head of one label."""
    if name != "Reward":
        return tiny_model("llama", dtype=dtype)
    config = tiny_config("llama", num_labels=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return model.to(dtype).eval()


@dataclass(frozen=True)
class Kind:
    """What one trainer needs beyond the common options.

    Args:
        trainer: `module:class`.
        config: `module:class` of its arguments.
        data: Builds its data set.
        arguments: Builds the other arguments of its constructor.
        options: Config fields.
        long_rollouts: Config fields with which several micro-batches come from one batch of sampled completions.
        passes: Forward passes of a micro-batch with gradients.
        is_reentrant_refused: Its config refuses re-entrant activation checkpointing.
    """

    trainer: str
    config: str
    data: Callable[[], Dataset]
    arguments: Callable[[], dict[str, Any]]
    options: dict[str, Any]
    long_rollouts: dict[str, Any] = field(default_factory=dict)
    passes: int = 1
    is_reentrant_refused: bool = False


def letters(completions: list[str], **columns: Any) -> list[float]:
    """Reward that differs between almost any two completions."""
    return [sum(map(ord, completion)) % 7 / 7 for completion in completions]


def _sums() -> list[tuple[str, str]]:
    return [(f"{a} + {b} = ", f"{a + b}") for a in range(ROWS // 2) for b in (3, 8)]


def _tokens() -> Dataset:
    rows = [tiny_tokenizer()(prompt + answer)["input_ids"] for prompt, answer in _sums()]
    length = max(map(len, rows))
    padded = [[0] * (length - len(row)) + row for row in rows]
    return Dataset.from_dict({"input_ids": padded, "labels": padded})


def _texts() -> Dataset:
    return Dataset.from_dict({"text": [prompt + answer for prompt, answer in _sums()]})


def _prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [prompt for prompt, _ in _sums()]})


def _pairs() -> Dataset:
    return Dataset.from_list([{"prompt": p, "chosen": answer, "rejected": answer[::-1] + "?"} for p, answer in _sums()])


def _labelled() -> Dataset:
    rows = [{"prompt": p, "completion": answer, "label": i % 2 == 0} for i, (p, answer) in enumerate(_sums())]
    return Dataset.from_list(rows)


def _explained() -> Dataset:
    rows = [
        {"prompt": f"[{name}] {prompt}", "completion": text, "is_rationale": name == "rationale"}
        for prompt, answer in _sums()
        for name, text in (("label", answer), ("rationale", f"{prompt} {answer}"))
    ]
    return Dataset.from_list(rows[:ROWS])


def _tokenizer() -> dict[str, Any]:
    return {"processing_class": tiny_tokenizer()}


def _with_reference() -> dict[str, Any]:
    return {**_tokenizer(), "ref_model": tiny_model("llama")}


_SAMPLING = {"num_generations": 2, "max_completion_length": 4}

TRAINERS: dict[str, Kind] = {
    "Trainer": Kind("transformers:Trainer", "transformers:TrainingArguments", _tokens, dict, {}),
    "SFT": Kind("trl:SFTTrainer", "trl:SFTConfig", _texts, _tokenizer, {}),
    "StepByStep": Kind(
        "subnet_ft.training.step_by_step:StepByStepTrainer",
        "subnet_ft.training.step_by_step:StepByStepConfig",
        _explained,
        _tokenizer,
        {},
        passes=2,  # one of labels, one of rationales
        is_reentrant_refused=True,
    ),
    "DPO": Kind("trl:DPOTrainer", "trl:DPOConfig", _pairs, _with_reference, {}),
    "KTO": Kind("trl:KTOTrainer", "trl:KTOConfig", _labelled, _with_reference, {}),
    "GRPO": Kind(
        "trl:GRPOTrainer",
        "trl:GRPOConfig",
        _prompts,
        lambda: {**_tokenizer(), "reward_funcs": letters},
        _SAMPLING,
        {"steps_per_generation": 4},
    ),
    "RLOO": Kind(
        "trl:RLOOTrainer",
        "trl:RLOOConfig",
        _prompts,
        lambda: {**_tokenizer(), "reward_funcs": letters},
        _SAMPLING,
        {"steps_per_generation": 4},
    ),
    "PPO": Kind(
        "subnet_ft.training.ppo:PPOTrainer",
        "subnet_ft.training.ppo:PPOConfig",
        _prompts,
        lambda: {**_tokenizer(), "reward_funcs": letters},
        _SAMPLING,
        {"steps_per_generation": 4},
    ),
    "PRIME": Kind(
        "subnet_ft.training.prime:PRIMETrainer",
        "subnet_ft.training.prime:PRIMEConfig",
        _prompts,
        lambda: {**_tokenizer(), "reward_funcs": letters},
        {**_SAMPLING, "accuracy_low": 0.0, "accuracy_high": 1.0},
        {"steps_per_generation": 4},
    ),
    "Reward": Kind("trl:RewardTrainer", "trl:RewardConfig", _pairs, _tokenizer, {}),
    "Distillation": Kind(
        "trl:DistillationTrainer",
        "trl:DistillationConfig",
        _prompts,
        lambda: {**_tokenizer(), "teacher_model": tiny_model("llama", seed=1)},
        {"max_completion_length": 4},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2},
    ),
    "ORPO": Kind("trl.experimental.orpo:ORPOTrainer", "trl.experimental.orpo:ORPOConfig", _pairs, _tokenizer, {}),
    "CPO": Kind("trl.experimental.cpo:CPOTrainer", "trl.experimental.cpo:CPOConfig", _pairs, _tokenizer, {}),
}
