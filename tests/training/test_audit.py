"""Audits while a trainer trains: when they run, what they catch, and what they say they cost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import FIRST_IS_BEST, FROZEN, SAVES, SubnetTrainer, cut_off, plain, restricted, usual_mask
from training.masked_runs import Watch, same_weights, weights_of
from transformers import Trainer

from subnet_ft.checkpoints.tiny import tiny_model
from subnet_ft.errors import FrozenWeightError, TrainerError
from subnet_ft.optim import MaskedAdamW
from subnet_ft.optim.frozen import FrozenWeights
from subnet_ft.training.audit import FrozenWeightAudit
from subnet_ft.training.resume import newest_complete

PARTIAL = "model.layers.1.mlp.down_proj.weight"
FULL_RUN = {"max_steps": 5}


def audits_of(trainer: Any) -> FrozenWeightAudit:
    (audit,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, FrozenWeightAudit)]
    return audit


def write(trainer: Trainer, name: str, *, on_mask: bool = False, bit: int = 0) -> None:
    """Flip a bit of one weight behind torch's back."""
    flat = dict(trainer.model.named_parameters())[name].data.view(-1)
    chosen = usual_mask()[name].view(-1)
    place = int((chosen if on_mask else ~chosen).nonzero()[0])
    flat.view(torch.int16).numpy()[place] ^= 1 << bit


def at(step: int, act: Callable[[], None], *, when: str = "after") -> Watch:
    return Watch(**{when: lambda number: act() if number == step else None})  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "expected"), [(1, 6), (2, 4), (3, 3), (9, 2)])
def test_audits_run_at_the_start_every_so_many_steps_and_at_the_end(
    tmp_path: Path, steps: int, expected: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    check = FrozenWeights.check
    monkeypatch.setattr(FrozenWeights, "check", lambda self: (calls.append(None), check(self)))
    trainer = restricted(tmp_path, subnet={"audit_steps": steps}, **FULL_RUN)
    with caplog.at_level(logging.INFO, logger="subnet_ft"):
        trainer.train()
    audit = audits_of(trainer)
    assert audit.num_audits == len(calls) == expected
    (summary,) = [entry for entry in trainer.state.log_history if "train_runtime" in entry]
    assert summary["audits"] == expected
    assert 0 < summary["audit_seconds"] + 0.001 <= summary["train_runtime"] + 0.001
    assert summary["audit_seconds"] == round(audit.seconds, 3)
    assert f"{expected} audits of the weights outside the mask passed in {audit.seconds:.2f} s" in caplog.messages


def test_audits_change_no_bit(tmp_path: Path) -> None:
    weights = []
    for subnet in ({}, {"audit_steps": 1}):
        trainer = restricted(tmp_path, subnet=subnet)
        trainer.train()
        weights.append(weights_of(trainer.model))
    same_weights(*weights)


def test_without_audits_nothing_is_logged_about_them(tmp_path: Path) -> None:
    trainer = restricted(tmp_path)
    trainer.train()
    assert not any("audit" in key for entry in trainer.state.log_history for key in entry)


@pytest.mark.parametrize("name", [FROZEN, PARTIAL])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_write_off_the_mask_stops_the_run_at_the_next_audit(tmp_path: Path, name: str, when: str) -> None:
    trainer = restricted(tmp_path, subnet={"audit_steps": 2}, **FULL_RUN, **SAVES)
    trainer.add_callback(at(3, lambda: write(trainer, name), when=when))
    with pytest.raises(FrozenWeightError, match=f"in `{name}` "):
        trainer.train()
    assert trainer.state.global_step == 4
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-3"  # the step of the audit was not saved


def test_a_write_after_the_last_step_is_caught_at_the_end(tmp_path: Path) -> None:
    trainer = restricted(tmp_path, subnet={"audit_steps": 99})
    trainer.add_callback(at(4, lambda: write(trainer, FROZEN)))
    with pytest.raises(FrozenWeightError, match=FROZEN):
        trainer.train()


def test_a_run_that_is_stopped_early_is_audited_at_its_end(tmp_path: Path) -> None:
    class StopAtTwo(Watch):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    for is_clean in (True, False):
        trainer = restricted(tmp_path, subnet={"audit_steps": 99}, callbacks=[StopAtTwo()])
        if is_clean:
            trainer.train()
            assert audits_of(trainer).num_audits == 2
            continue
        trainer.add_callback(at(2, lambda trainer=trainer: write(trainer, FROZEN)))
        with pytest.raises(FrozenWeightError, match=FROZEN):
            trainer.train()


def test_a_write_on_the_mask_is_nobody_elses_business(tmp_path: Path) -> None:
    trainer = restricted(tmp_path, subnet={"audit_steps": 1})
    trainer.add_callback(at(2, lambda: write(trainer, PARTIAL, on_mask=True, bit=3)))
    trainer.train()


def test_a_resumed_run_is_audited_by_the_start_of_the_first_one(tmp_path: Path) -> None:
    audited = {"audit_steps": 1}
    cut_off(restricted(tmp_path, subnet=audited, **SAVES), after=3)
    restricted(tmp_path, subnet=audited).train(resume_from_checkpoint=True)
    trainer = restricted(tmp_path, subnet=audited)
    load = trainer._load_from_checkpoint

    def spoiled(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        write(trainer, FROZEN)

    trainer._load_from_checkpoint = spoiled
    with pytest.raises(ValueError, match=f"outside the mask, `{FROZEN}`"):
        trainer.train(resume_from_checkpoint=True)


def test_a_second_run_of_one_trainer_is_audited_by_the_start_of_the_first(tmp_path: Path) -> None:
    trainer = restricted(tmp_path, subnet={"audit_steps": 1}, max_steps=2)
    trainer.train()
    trainer.train()
    write(trainer, FROZEN)
    with pytest.raises(FrozenWeightError, match=FROZEN):
        trainer.train()


def test_the_best_model_is_audited_too(tmp_path: Path) -> None:
    trainer = restricted(tmp_path, subnet={"audit_steps": 99}, **FIRST_IS_BEST)
    load = trainer._load_best_model

    def spoiled() -> None:
        load()
        write(trainer, FROZEN)

    trainer._load_best_model = spoiled
    with pytest.raises(FrozenWeightError, match=FROZEN):
        trainer.train()


def test_the_class_form_audits(tmp_path: Path) -> None:
    arguments = {"subnet_mask": usual_mask(), "subnet_options": {"audit_steps": 1}}
    trainer = plain(tmp_path, trainer_class=SubnetTrainer, arguments=arguments)
    trainer.add_callback(at(2, lambda: write(trainer, FROZEN)))
    with pytest.raises(FrozenWeightError, match=FROZEN):
        trainer.train()


def test_an_audit_on_a_trainer_of_ones_own_with_a_best_model(tmp_path: Path) -> None:
    """A plain trainer that was given a masked optimizer writes plain checkpoints."""
    model = tiny_model("llama")
    optimizer = MaskedAdamW(model.named_parameters(), usual_mask(), lr=1e-2, max_grad_norm=1.0)
    audit = FrozenWeightAudit(1)
    trainer = plain(
        tmp_path, model=model, callbacks=[audit], arguments={"optimizers": (optimizer, None)}, max_grad_norm=0.0,
        **FIRST_IS_BEST,
    )  # fmt: skip
    trainer.train()
    assert audit.num_audits >= 5
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_an_audit_needs_a_masked_optimizer_and_a_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`steps` must be >= 1, got 0"):
        FrozenWeightAudit(0)
    trainer = plain(tmp_path, callbacks=[FrozenWeightAudit(1)])
    with pytest.raises(TrainerError, match="not a masked one"):
        trainer.train()
