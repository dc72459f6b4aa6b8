"""`restrict` on real trainers: what moves, what is logged, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import QUIET, random_bits, same_bits
from transformers import Trainer, TrainerCallback, TrainingArguments

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.errors import MaskMismatchError, TrainerError
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask
from subnet_ft.optim import MaskedAdamW
from subnet_ft.training import restrict


def build(folder: Path, **options: Any) -> Trainer:
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(f"{a} + {b} = {a + b}")["input_ids"] for a in range(10) for b in (3, 4)]
    length = max(map(len, rows))
    padded = [[0] * (length - len(row)) + row for row in rows]
    dataset = Dataset.from_dict({"input_ids": padded, "labels": padded})
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        **QUIET,
        **options,
    }
    return Trainer(model=tiny_model("llama"), args=TrainingArguments(**arguments), train_dataset=dataset)


def half_mask(model: torch.nn.Module) -> SubnetMask:
    dense = {
        name: random_bits(parameter.numel(), 0.3, seed).view(parameter.shape)
        for seed, (name, parameter) in enumerate(model.named_parameters())
    }
    dense["model.layers.0.self_attn.q_proj.weight"][:] = False
    return SubnetMask.from_dense(dense)


def test_restrict_trains_the_mask_and_nothing_else(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    mask = half_mask(trainer.model)
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    assert restrict(trainer, mask) is trainer
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        chosen = mask[name]
        assert same_bits(parameter.detach()[~chosen], start[name][~chosen])
        assert not chosen.any() or (parameter.detach()[chosen] != start[name][chosen]).float().mean() > 0.5
    assert not dict(trainer.model.named_parameters())["model.layers.0.self_attn.q_proj.weight"].requires_grad


def test_restrict_takes_the_hyper_parameters_of_the_trainer(tmp_path: Path) -> None:
    trainer = restrict(build(tmp_path, adam_beta2=0.95, adam_epsilon=1e-6), half_mask(tiny_model("llama")))
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, MaskedAdamW)
    decayed, exempt = optimizer.param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert decayed["lr"] == 1e-2
    assert decayed["betas"] == (0.9, 0.95)
    assert decayed["eps"] == 1e-6
    assert all("norm" in name for name in exempt["param_names"])
    assert not any("norm" in name for name in decayed["param_names"])


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.25])
@pytest.mark.parametrize("compact_grads", [True, False])
def test_restrict_clips_and_logs_the_masked_norm(tmp_path: Path, max_grad_norm: float, compact_grads: bool) -> None:
    trainer = build(tmp_path, max_grad_norm=max_grad_norm, max_steps=2)
    mask = half_mask(trainer.model)
    seen: list[tuple[float, float]] = []
    restrict(trainer, mask, compact_grads=compact_grads)
    optimizer = trainer.create_optimizer()
    step = optimizer.step
    squares: dict[str, float] = {}  # of what autograd computed, whatever the optimizer makes of it

    def watch(name: str, parameter: torch.nn.Parameter) -> None:
        def hook(grad: torch.Tensor) -> None:
            squares[name] = float(grad[mask[name]].float().square().sum())

        parameter.register_hook(hook)

    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            watch(name, parameter)

    def spy(*args: Any) -> Any:
        norm = sum(squares.values()) ** 0.5
        before = {p: s["exp_avg"].clone() for p, s in optimizer.state.items()}
        result = step(*args)
        moved = [(s["exp_avg"] - 0.9 * before.get(p, 0.0)) / 0.1 for p, s in optimizer.state.items()]
        seen.append((norm, float(torch.cat(moved).norm())))
        return result

    optimizer.step = spy
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    for (masked, used), shown in zip(seen, logged, strict=True):
        assert shown == pytest.approx(masked, rel=1e-4)
        expected = min(masked, max_grad_norm) if max_grad_norm else masked
        assert used == pytest.approx(expected, rel=1e-3)


def test_restrict_with_a_full_mask_trains_everything(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    restrict(trainer, SubnetMask.full({name: tuple(value.shape) for name, value in start.items()}))
    trainer.train()
    assert all(not torch.equal(p.detach(), start[n]) for n, p in trainer.model.named_parameters() if p.dim() > 1)


def test_restrict_refuses_a_mask_of_another_base(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    mask = half_mask(trainer.model)
    other = Provenance(base=ModelRecord("other/base", fingerprints=dict.fromkeys(mask.names, "0" * 32)))
    with pytest.raises(MaskMismatchError, match="other/base"):
        restrict(trainer, SubnetMask(mask.tensors, other))


def test_restrict_refuses_a_trainer_that_has_an_optimizer(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.create_optimizer()
    with pytest.raises(TrainerError, match="already has an optimizer, AdamW"):
        restrict(trainer, half_mask(trainer.model))


def test_restrict_refuses_to_replace_a_chosen_optimizer(tmp_path: Path) -> None:
    trainer = build(tmp_path, optim="adafactor")
    with pytest.raises(TrainerError, match="asks for the optimizer `adafactor`"):
        restrict(trainer, half_mask(trainer.model))


def test_restrict_refuses_a_second_mask(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    mask = half_mask(trainer.model)
    restrict(trainer, mask)
    full = SubnetMask.full({name: tuple(p.shape) for name, p in trainer.model.named_parameters()})
    with pytest.raises(TrainerError, match=f"already restricted to mask {mask.fingerprint[:16]}"):
        restrict(trainer, full)
    assert trainer.create_optimizer().mask is mask


def test_restrict_refuses_an_optimizer_that_was_set_after_it(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    restrict(trainer, half_mask(trainer.model))
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-2)
    with pytest.raises(TrainerError, match="got an optimizer, SGD, after `restrict`"):
        trainer.train()


def test_restrict_lets_a_trainer_train_twice(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=2)
    mask = half_mask(trainer.model)
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    restrict(trainer, mask)
    trainer.train()
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert same_bits(parameter.detach()[~mask[name]], start[name][~mask[name]])


def test_restrict_trains_tensors_of_the_mask_that_were_frozen(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    frozen = dict(trainer.model.named_parameters())[name].requires_grad_(False)
    start = frozen.detach().clone()
    restrict(trainer, half_mask(trainer.model)).train()
    assert not torch.equal(frozen.detach(), start)


def test_restrict_refuses_a_trainer_that_makes_its_own_model(tmp_path: Path) -> None:
    built = build(tmp_path)
    trainer = Trainer(model_init=lambda: tiny_model("llama"), args=built.args, train_dataset=built.train_dataset)
    with pytest.raises(TrainerError, match="builds a new model with `model_init`"):
        restrict(trainer, half_mask(tiny_model("llama")))


def test_restrict_refuses_a_model_that_was_set_after_it(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    restrict(trainer, half_mask(trainer.model))
    trainer.model = tiny_model("llama")
    with pytest.raises(TrainerError, match="got another model after `restrict`"):
        trainer.train()


class BreaksOff(TrainerCallback):
    """Ends the first run between two micro-batches."""

    def __init__(self) -> None:
        self.is_done = False

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_done:
            self.is_done = True
            raise KeyboardInterrupt


def test_restrict_forgets_the_gradients_of_a_run_that_was_broken_off(tmp_path: Path) -> None:
    weights = []
    for breaks_off in (True, False):
        trainer = build(tmp_path, gradient_accumulation_steps=2, max_steps=2)
        restrict(trainer, half_mask(trainer.model))
        if breaks_off:
            trainer.add_callback(BreaksOff())
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        trainer.train()
        weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*weights, strict=True))
