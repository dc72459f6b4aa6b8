"""A training loop of your own: accumulation, clipping, a schedule, saving and resuming, with AdamW and with SGD."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _shared import batches, copy_weights, random_mask, report

from subnet_ft import MaskedAdamW, MaskedSGD, SubnetMask
from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer

Optimizer = MaskedAdamW | MaskedSGD
Schedule = torch.optim.lr_scheduler.LambdaLR
ACCUMULATE = 2


def build(name: str, mask: SubnetMask) -> tuple[torch.nn.Module, Optimizer, Schedule]:
    model = tiny_model("llama")
    optimizer: Optimizer
    if name == "MaskedSGD":
        optimizer = MaskedSGD(model.named_parameters(), mask, lr=1e-1, momentum=0.9, max_grad_norm=None)
    else:
        optimizer = MaskedAdamW(model.named_parameters(), mask, lr=1e-2, weight_decay=0.1, max_grad_norm=None)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    return model, optimizer, schedule


def train(model: torch.nn.Module, optimizer: Optimizer, schedule: Schedule, data: list[torch.Tensor]) -> None:
    for number, batch in enumerate(data, start=1):
        (model(input_ids=batch, labels=batch).loss / ACCUMULATE).backward()
        if number % ACCUMULATE == 0:
            optimizer.clip_grad_norm_(1.0)  # not torch's: `.grad` is None here
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def save(path: Path, model: torch.nn.Module, optimizer: Optimizer, schedule: Schedule) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state, path)


def load(path: Path, model: torch.nn.Module, optimizer: Optimizer, schedule: Schedule) -> None:
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])


def main() -> None:
    data = (batches(tiny_tokenizer()) * 2)[:8]
    mask = random_mask(tiny_model("llama"))  # yours: SubnetMask.load("run.subnet.safetensors", base="my/base")
    for name in ("MaskedAdamW", "MaskedSGD"):
        model, optimizer, schedule = build(name, mask)
        before = copy_weights(model)
        train(model, optimizer, schedule, data)
        report(name, model, before, mask)

        with tempfile.TemporaryDirectory() as folder:
            first = build(name, mask)
            train(*first, data[:4])
            save(Path(folder, "half.pt"), *first)
            resumed = build(name, mask)
            load(Path(folder, "half.pt"), *resumed)
        train(*resumed, data[4:])
        same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed[0].parameters(), strict=True))
        if not same:
            raise SystemExit(f"{name}: a resumed run ended with other weights than an uninterrupted one.")
        print(f"{name}: saved, resumed, and ended with the same bits")


if __name__ == "__main__":
    main()
