"""`transformers.Trainer` on a subnetwork: build the trainer as ever, then `restrict` it."""

from __future__ import annotations

from _shared import batches, copy_weights, random_mask, report, trainer_options
from transformers import Trainer, TrainingArguments

from subnet_ft import restrict
from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer


def main() -> None:
    model = tiny_model("llama")
    rows = [{"input_ids": row, "labels": row} for batch in batches(tiny_tokenizer()) for row in batch]
    mask = random_mask(model)  # yours: SubnetMask.load("run.subnet.safetensors", base="my/base")
    before = copy_weights(model)

    args = TrainingArguments(**trainer_options(steps=4), max_grad_norm=1.0, gradient_accumulation_steps=2)
    trainer = restrict(Trainer(model=model, args=args, train_dataset=rows), mask)
    trainer.train()

    report("transformers.Trainer", model, before, mask)


if __name__ == "__main__":
    main()
