"""The loss of distilling step-by-step against one computed by hand: a mean for labels, a mean for rationales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from training.step_by_step.step_by_step_runs import build_trainer, row

from subnet_ft.checkpoints.tiny import tiny_tokenizer
from subnet_ft.errors import TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.training import restrict

# Targets of 2, 8 and 3 tokens with the end token, of which the last is a label again.
ROWS = [row("label", "5 + 9 =", "1"), row("rationale", "5 + 9 =", "9+1+4: "), row("label", "7 =", "70")]


def token_losses(model: Any, one: dict[str, Any]) -> torch.Tensor:
    """Return (T,) negative log-likelihoods of a completion's tokens and of its end, from the model's own logits."""
    tokenizer = tiny_tokenizer()
    prompt = tokenizer(one["prompt"])["input_ids"]
    whole = torch.tensor([tokenizer(one["prompt"] + one["completion"] + "<eos>")["input_ids"]])
    with torch.no_grad():
        log_probs = model(whole).logits[0, :-1].log_softmax(-1)
    return -log_probs.gather(1, whole[0, 1:, None]).squeeze(1)[len(prompt) - 1 :]


def loss_by_hand(model: Any, rows: list[dict[str, Any]], weight: float) -> float:
    means = []
    for is_rationale in (False, True):
        losses = [token_losses(model, one) for one in rows if one["is_rationale"] is is_rationale]
        means.append(float(torch.cat(losses).mean()) if losses else 0.0)
    return means[0] + weight * means[1]


def batch_of(trainer: Any, rows: list[int]) -> dict[str, Any]:
    batch: dict[str, Any] = trainer.data_collator([trainer.train_dataset[index] for index in rows])
    return batch


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("chosen", [[0, 1], [0, 1, 2], [0, 2], [1]], ids=str)
def test_compute_loss_is_a_mean_for_each_kind(chosen: list[int], weight: float, tmp_path: Path) -> None:
    trainer = build_trainer(ROWS, tmp_path, rationale_weight=weight)
    trainer.model.train()
    loss = float(trainer.compute_loss(trainer.model, batch_of(trainer, chosen)).detach())
    rows = [ROWS[index] for index in chosen]
    assert loss == pytest.approx(loss_by_hand(trainer.model, rows, weight), rel=1e-5)
    if chosen == [0, 1] and weight == 1.0:
        # One mean over all tokens, which is what SFT takes, is another number.
        pooled = float(torch.cat([token_losses(trainer.model, one) for one in rows]).mean())
        assert abs(loss - 2 * pooled) > 0.05


def test_compute_loss_logs_both_losses_before_their_weight(tmp_path: Path) -> None:
    trainer = build_trainer(ROWS, tmp_path, rationale_weight=0.25, max_steps=1, per_device_train_batch_size=3)
    label, rationale = (loss_by_hand(trainer.model, [one for one in ROWS if one["is_rationale"] is kind], 1.0)
                        for kind in (False, True))  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["label_loss"] == pytest.approx(label, rel=1e-4)
    assert logged["rationale_loss"] == pytest.approx(rationale, rel=1e-4)
    assert logged["loss"] == pytest.approx(label + 0.25 * rationale, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_train_accumulates_to_the_step_of_one_batch(size: int, tmp_path: Path) -> None:
    rows = [*ROWS, row("rationale", "7 =", "0+7*1+8-8=")]
    runs = []
    for batch, parts in ((4, 1), (size, 4 // size)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts, "max_steps": 2}
        trainer = build_trainer(rows, tmp_path, **options, optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
        trainer.train()
        runs.append((trainer.state.log_history, dict(trainer.model.named_parameters())))
    for whole, in_parts in zip(runs[0][0][:2], runs[1][0][:2], strict=True):
        for name in ("loss", "label_loss", "rationale_loss", "grad_norm"):
            assert in_parts[name] == pytest.approx(whole[name], rel=2e-3), name
    for name, weight in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], weight, rtol=1e-4, atol=1e-5)


def test_train_leaves_a_loss_out_where_a_step_has_no_row_of_its_kind(tmp_path: Path) -> None:
    trainer = build_trainer([ROWS[0], ROWS[2]], tmp_path, max_steps=2, per_device_train_batch_size=2)
    trainer.train()
    assert all("rationale_loss" not in entry for entry in trainer.state.log_history)
    assert all("label_loss" in entry for entry in trainer.state.log_history[:-1])


def test_restrict_trains_only_the_mask(tmp_path: Path) -> None:
    trainer = build_trainer(ROWS, tmp_path, max_steps=3, per_device_train_batch_size=3)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    draws = {name: torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3
             for name, weight in before.items()}  # fmt: skip
    restrict(trainer, SubnetMask.from_dense(draws)).train()
    for name, weight in trainer.model.named_parameters():
        assert same_bits(weight.detach()[~draws[name]], before[name][~draws[name]])
        assert (weight.detach() != before[name]).sum() > 0.2 * draws[name].sum()


def test_trainer_needs_to_know_which_rows_are_rationales(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"no column `is_rationale`.*it has prompt, completion"):
        build_trainer([{"prompt": "a", "completion": "b"}], tmp_path)


def test_trainer_does_not_evaluate(tmp_path: Path) -> None:
    trainer = build_trainer(ROWS, tmp_path)
    with pytest.raises(TrainerError, match="trains and does not evaluate"):
        trainer.evaluate(trainer.train_dataset)
