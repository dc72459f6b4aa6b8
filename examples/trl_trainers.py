"""TRL's trainers on a subnetwork: nine trainers, built as TRL's own pages build them, and one line for all of them.

    python examples/trl_trainers.py          # all
    python examples/trl_trainers.py grpo kto

The line is `trainer = restrict(trainer, mask)`, between building a trainer and `trainer.train()`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from _shared import SUMS, copy_weights, random_mask, report, trainer_options
from datasets import Dataset

from subnet_ft import restrict
from subnet_ft.checkpoints.tiny import tiny_config, tiny_model, tiny_tokenizer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # orpo and cpo live in trl.experimental, which warns

PROMPTS = Dataset.from_list([{"prompt": prompt} for prompt, _, _ in SUMS])
TEXTS = Dataset.from_list([{"prompt": prompt, "completion": right} for prompt, right, _ in SUMS])
PAIRS = Dataset.from_list([{"prompt": prompt, "chosen": right, "rejected": wrong} for prompt, right, wrong in SUMS])
LABELED = Dataset.from_list(
    [
        {"prompt": prompt, "completion": answer, "label": is_right}
        for prompt, right, wrong in SUMS
        for answer, is_right in ((right, True), (wrong, False))
    ]
)


def digits(completions: list[str], **_: Any) -> list[float]:
    """Reward digits."""
    return [float(sum(character.isdigit() for character in completion)) for completion in completions]


def sft(model: Any, tokenizer: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**trainer_options())
    return SFTTrainer(model=model, args=args, train_dataset=TEXTS, processing_class=tokenizer)


def dpo(model: Any, tokenizer: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**trainer_options())
    ref_model = tiny_model("llama")
    return DPOTrainer(model=model, ref_model=ref_model, args=args, train_dataset=PAIRS, processing_class=tokenizer)


def kto(model: Any, tokenizer: Any) -> Any:
    from trl import KTOConfig, KTOTrainer

    args = KTOConfig(**trainer_options())
    ref_model = tiny_model("llama")
    return KTOTrainer(model=model, ref_model=ref_model, args=args, train_dataset=LABELED, processing_class=tokenizer)


def grpo(model: Any, tokenizer: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(**trainer_options(), num_generations=4, max_completion_length=8)
    return GRPOTrainer(model=model, reward_funcs=digits, args=args, train_dataset=PROMPTS, processing_class=tokenizer)


def rloo(model: Any, tokenizer: Any) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    args = RLOOConfig(**trainer_options(), num_generations=4, max_completion_length=8, beta=0.0)
    return RLOOTrainer(model=model, reward_funcs=digits, args=args, train_dataset=PROMPTS, processing_class=tokenizer)


def reward(model: Any, tokenizer: Any) -> Any:
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(**trainer_options())
    return RewardTrainer(model=model, args=args, train_dataset=PAIRS, processing_class=tokenizer)


def distillation(model: Any, tokenizer: Any) -> Any:
    from trl import DistillationConfig, DistillationTrainer

    args = DistillationConfig(**trainer_options(), max_completion_length=8)
    teacher = tiny_model("llama", seed=1)
    return DistillationTrainer(
        model=model, teacher_model=teacher, args=args, train_dataset=PROMPTS, processing_class=tokenizer
    )


def orpo(model: Any, tokenizer: Any) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    args = ORPOConfig(**trainer_options(), max_length=32)
    return ORPOTrainer(model=model, args=args, train_dataset=PAIRS, processing_class=tokenizer)


def cpo(model: Any, tokenizer: Any) -> Any:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    args = CPOConfig(**trainer_options(), max_length=32)
    return CPOTrainer(model=model, args=args, train_dataset=PAIRS, processing_class=tokenizer)


TRAINERS = {build.__name__: build for build in (sft, dpo, kto, grpo, rloo, reward, distillation, orpo, cpo)}


def policy(name: str) -> Any:
    """Build the tiny model that a trainer wants."""
    if name != "reward":
        return tiny_model("llama")
    import torch
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1), dtype=torch.bfloat16)


def main(names: list[str]) -> None:
    for name in names or TRAINERS:
        model = policy(name)
        mask = random_mask(model)  # yours: SubnetMask.load("run.subnet.safetensors", base="my/base")
        before = copy_weights(model)

        trainer = TRAINERS[name](model, tiny_tokenizer())
        trainer = restrict(trainer, mask)
        trainer.train()

        report(type(trainer).__name__, model, before, mask)


if __name__ == "__main__":
    main(sys.argv[1:])
