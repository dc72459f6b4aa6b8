"""A world in which rationales teach: the parity of three hidden bits, which no model learns from a few labels alone."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from training.step_by_step.step_by_step_runs import build_trainer, row

from subnet_ft.checkpoints.tiny import tiny_tokenizer

# Every letter has a hidden bit, and the label of a word is the parity of its letters'.
BITS = {letter: index % 2 for index, letter in enumerate("hcfabged")}


def is_odd(word: str) -> int:
    return sum(BITS[letter] for letter in word) % 2


def examples(count: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows for `count` words, whose rationales count the parity up, and the words that are held out."""
    words = ["".join(letters) for letters in itertools.product(BITS, repeat=3)]
    random.Random(0).shuffle(words)
    rows = []
    for word in words[:count]:
        steps = "".join(str(is_odd(word[: end + 1])) for end in range(len(word)))
        rows += [row("label", word, "EO"[is_odd(word)]), row("rationale", word, steps)]
    return rows, words[count:]


def accuracy(model: Any, words: list[str]) -> float:
    tokenizer = tiny_tokenizer()
    even, odd = (tokenizer(letter)["input_ids"][0] for letter in "EO")
    prompts = torch.tensor([tokenizer(f"[label] {word}")["input_ids"] for word in words])
    with torch.no_grad():
        logits = model.eval()(prompts).logits[:, -1]
    right = (logits[:, odd] > logits[:, even]).long() == torch.tensor([is_odd(word) for word in words])
    return float(right.float().mean())


def test_rationales_teach_what_labels_alone_do_not(tmp_path: Path) -> None:
    rows, held_out = examples(100)
    found = {}
    for weight in (0.0, 1.0):
        options = {"max_steps": 240, "per_device_train_batch_size": 32, "learning_rate": 3e-3}
        trainer = build_trainer(rows, tmp_path, rationale_weight=weight, **options)
        trainer.train()
        words = [one["prompt"].removeprefix("[label] ") for one in rows[::2]]
        found[weight] = (accuracy(trainer.model, words), accuracy(trainer.model, held_out))
    assert found[0.0][0] > 0.7  # it has learned most of its labels by heart
    assert found[0.0][1] < 0.6
    assert found[1.0][1] > 0.8
    assert found[1.0][1] == pytest.approx(found[1.0][0], abs=0.15)
