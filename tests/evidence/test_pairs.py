"""Records of held-out pairs: right only where the chosen completion gets the higher reward, read as TRL trains it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import QUIET
from training.every_trainer import base_model
from training.upstream import expect
from trl import RewardConfig, RewardTrainer

from subnet_ft.checkpoints.tiny import tiny_tokenizer
from subnet_ft.errors import TaskError
from subnet_ft.evidence.pairs import _tokenize, evaluate_pairs

TOKENIZER = tiny_tokenizer()
CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}<eos>{% endfor %}"
TEXT = [{"prompt": f"{i} + {i} = ", "chosen": str(2 * i), "rejected": "?" * (i + 1)} for i in range(5)]
IMPLICIT = [{"chosen": "a: yes<eos>", "rejected": "a: no"}]
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": "5 + 9 ="}],
        "chosen": [{"role": "assistant", "content": "14"}],
        "rejected": [{"role": "assistant", "content": "15, I think"}],
    }
]


@pytest.fixture(scope="module")
def model() -> Any:
    return base_model("Reward", torch.float32)


def test_evaluate_pairs_records_every_pair_in_order(model: Any) -> None:
    records = evaluate_pairs(model, TOKENIZER, TEXT, batch_size=3)
    assert [record["prompt"] for record in records] == [pair["prompt"] for pair in TEXT]
    for record, pair in zip(records, TEXT, strict=True):
        for name in ("chosen", "rejected"):
            tokens = TOKENIZER(pair["prompt"] + pair[name] + "<eos>", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                expected = float(model(tokens).logits)
            assert record[f"{name}_reward"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert record["correct"] is (record["chosen_reward"] > record["rejected_reward"])
        assert record["score"] == float(record["correct"])
        assert record["answer"] == f"chosen: {pair['chosen']}\nrejected: {pair['rejected']}"
    assert {record["correct"] for record in records} == {True, False}
    assert json.loads(json.dumps(records)) == records


def test_evaluate_pairs_of_swapped_completions_turns_every_outcome(model: Any) -> None:
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in TEXT]
    outcomes = [
        [record["correct"] for record in evaluate_pairs(model, TOKENIZER, pairs, batch_size=4)]
        for pairs in (TEXT, swapped)
    ]
    assert outcomes[0] == [not correct for correct in outcomes[1]]


def test_evaluate_pairs_counts_a_tie_as_wrong(model: Any) -> None:
    (record,) = evaluate_pairs(model, TOKENIZER, [{"prompt": "a", "chosen": "b", "rejected": "b"}], batch_size=2)
    assert record["chosen_reward"] == record["rejected_reward"]
    assert not record["correct"]


def test_evaluate_pairs_does_not_depend_on_the_batch_size(model: Any) -> None:
    runs = [evaluate_pairs(model, TOKENIZER, TEXT, batch_size=size) for size in (1, 3, 64)]
    for name in ("chosen_reward", "rejected_reward"):
        one, three, all_ = ([record[name] for record in run] for run in runs)
        assert one == pytest.approx(three, rel=1e-5, abs=1e-6)
        assert one == pytest.approx(all_, rel=1e-5, abs=1e-6)


def test_evaluate_pairs_leaves_the_mode_alone(model: Any) -> None:
    model.train()
    evaluate_pairs(model, TOKENIZER, TEXT, batch_size=2)
    assert model.training
    model.eval()


def test_evaluate_pairs_needs_pairs(model: Any) -> None:
    with pytest.raises(TaskError, match=r"no held-out pair to judge by\. Raise task\.num_eval"):
        evaluate_pairs(model, TOKENIZER, [], batch_size=2)


@pytest.mark.parametrize("pairs", [TEXT, IMPLICIT, MESSAGES], ids=["text", "implicit", "messages"])
def test_evaluate_pairs_reads_the_tokens_that_trl_trains_on(pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    args = RewardConfig(output_dir=str(tmp_path), bf16=False, **QUIET)
    trainer = RewardTrainer(
        base_model("Reward"), args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    found = [{name: list(row[f"{name}_ids"]) for name in ("chosen", "rejected")} for row in trainer.train_dataset]
    ours = [{name: _tokenize(tokenizer, pair, name) for name in ("chosen", "rejected")} for pair in pairs]
    expect(found, ours, "trl:RewardTrainer._prepare_dataset", "subnet_ft/evidence/pairs.py")
