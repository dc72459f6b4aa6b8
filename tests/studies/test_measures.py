"""What studies measure: the likelihood of data under the base, and late rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.models import load_model
from subnet_ft.studies.measures import completion_loss, late_reward

ROWS = [
    {"prompt": "a in banana: ", "completion": "3"},
    {"prompt": "x in ", "completion": "a longer completion, 12"},
]


def test_completion_loss_is_that_of_one_row_at_a_time() -> None:
    model, tokenizer = load_model(open_checkpoint("tiny:llama").folder, dtype="float32")
    losses = []
    for row in ROWS:
        before = tokenizer(row["prompt"])["input_ids"]
        tokens = before + tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        losses += [-float(scores[at - 1, tokens[at]]) for at in range(len(before), len(tokens))]
    assert len(losses) > len(ROWS)
    assert completion_loss(model, tokenizer, ROWS) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ([{"reward": value} for value in (0, 0, 0, 0, 0, 0, 0.5, 1)] + [{"train_runtime": 1}], 0.75),
        ([{"rewards/accuracies": 0.5}], 0.5),
        ([{"loss": 1.0}], None),
    ],
)
def test_late_reward_is_the_mean_of_the_last_quarter(log: list[object], expected: float | None, tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(json.dumps(log))
    assert late_reward(tmp_path) == expected
