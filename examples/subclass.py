"""A trainer class of your own on a subnetwork: the mixin first, then the class, then whatever you override."""

from __future__ import annotations

from typing import Any

from _shared import SUMS, copy_weights, random_mask, report, trainer_options
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from subnet_ft import SubnetTrainerMixin
from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer


class MyTrainer(SubnetTrainerMixin, DPOTrainer):
    losses = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.losses += 1
        return super().compute_loss(*args, **kwargs)


def main() -> None:
    model = tiny_model("llama")
    pairs = Dataset.from_list([{"prompt": prompt, "chosen": right, "rejected": wrong} for prompt, right, wrong in SUMS])
    mask = random_mask(model)  # yours: SubnetMask.load("run.subnet.safetensors", base="my/base")
    before = copy_weights(model)

    trainer = MyTrainer(
        model=model,
        ref_model=tiny_model("llama"),
        args=DPOConfig(**trainer_options(steps=4)),
        train_dataset=pairs,
        processing_class=tiny_tokenizer(),
        subnet_mask=mask,
        subnet_options={"nonfinite": "skip", "audit_steps": 2},
    )
    trainer.train()

    report(f"{type(trainer).__name__}, {trainer.losses} losses", model, before, mask)


if __name__ == "__main__":
    main()
