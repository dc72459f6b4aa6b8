"""A loop on accelerate: `prepare`, `accumulate`, and clipping by the optimizer inside accelerate's wrapper."""

from __future__ import annotations

import torch
from _shared import batches, copy_weights, random_mask, report
from accelerate import Accelerator

from subnet_ft import MaskedAdamW, prepare_ddp
from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer


def main() -> None:
    model = tiny_model("llama")
    mask = random_mask(model)  # yours: SubnetMask.load("run.subnet.safetensors", base="my/base")
    before = copy_weights(model)
    rows = [row for batch in batches(tiny_tokenizer()) for row in batch]
    loader = torch.utils.data.DataLoader(rows, batch_size=2)

    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    prepare_ddp(model)  # before `prepare` wraps it: under DDP the optimizer reduces compact gradients
    optimizer = MaskedAdamW(model.named_parameters(), mask, lr=1e-2, max_grad_norm=None)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    norms = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            if accelerator.sync_gradients:
                norms.append(optimizer.optimizer.clip_grad_norm_(1.0))  # not accelerator.clip_grad_norm_
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    if not all(norm > 0 for norm in norms):
        raise SystemExit("Some step saw no gradient.")
    report(f"accelerate, {len(norms)} steps", accelerator.unwrap_model(model), before, mask)


if __name__ == "__main__":
    main()
