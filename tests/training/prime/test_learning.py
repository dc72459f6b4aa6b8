"""PRIME finds the best policy of a small world, by outcomes, by process rewards alone, and by both."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from training.masked_runs import check_weights, third_of, weights_of
from training.prime.prime_runs import LENGTH, logged, prime_trainer

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.training import restrict

STEPS = 60
LEARNING: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 3e-3, "prm_learning_rate": 3e-3, "prm_beta": 0.5}
"""Rates that a tiny model needs; with the paper's beta its process rewards are small beside its outcomes."""

BY = {
    "outcomes": {"process_coef": 0.0},
    "process rewards": {"outcome_coef": 0.0},
    "process rewards, scored first": {"outcome_coef": 0.0, "prm_update": "after"},
    "both": {},
}


def success(trainer: Any) -> tuple[float, float]:
    """Return the probability that the first token is a lower-case letter, before and after training."""
    letters = [tiny_tokenizer().convert_tokens_to_ids(chr(code)) for code in range(ord("a"), ord("z") + 1)]
    ids = tiny_tokenizer()(["2 + 3 = ", "1 + 8 = "], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before, after = (
            float(model(input_ids=ids).logits[:, -1].softmax(dim=1)[:, letters].sum(dim=1).mean())
            for model in (trainer.ref_model, trainer.model)
        )
    return before, after


@pytest.mark.parametrize("by", BY)
def test_prime_finds_the_best_policy_by(by: str, tmp_path: Path) -> None:
    trainer = prime_trainer(tmp_path, **LEARNING, **BY[by])
    trainer.train()
    before, after = success(trainer)
    assert before < 0.4
    assert after > 0.8
    assert fmean(logged(trainer, "reward")[-10:]) > 0.8
    # On completions it has not learned from yet, as long as there are wrong ones.
    assert fmean(logged(trainer, "prime/prm_accuracy")[20:]) > 0.7


@pytest.mark.parametrize("by", ["outcomes", "process rewards"])
def test_prime_with_its_sign_turned_around_unlearns(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that the test above can fail."""
    from subnet_ft.training.prime import trainer as module

    right = module.prime_advantages
    monkeypatch.setattr(module, "prime_advantages", lambda *args, **kwargs: -right(*args, **kwargs))
    trainer = prime_trainer(tmp_path, **LEARNING, **BY[by])
    trainer.train()
    before, after = success(trainer)
    assert after < before


def test_a_third_of_the_weights_finds_it_too(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    mask, start = third_of(model), weights_of(model)
    trainer = prime_trainer(tmp_path, model=model, reward_mask=mask, **{**LEARNING, "max_steps": 100})
    restrict(trainer, mask, audit_steps=20)
    trainer.train()
    before, after = success(trainer)
    assert before < 0.4
    assert after > 0.8
    check_weights(trainer.model, mask, start)
    check_weights(trainer.reward_model, mask, start)
    assert trainer.args.max_completion_length == LENGTH
