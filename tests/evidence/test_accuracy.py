"""Records of greedy answers: one per held-out prompt, in order, scored by the task."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.errors import TaskError
from subnet_ft.evidence.accuracy import evaluate_model
from subnet_ft.tasks import Example, Task, generate

TOKENIZER = tiny_tokenizer()
PROMPTS = ["5 + 9 =", "a", "71 - 26 = 45\n8 - 3 =", "b"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", dtype=torch.float32)


def _answers(model: Any) -> list[str]:
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "batch_size": 2, "seed": 0}
    return [row[0] for row in generate(model, TOKENIZER, PROMPTS, **options)]


def test_evaluate_model_records_every_prompt_in_order(model: Any) -> None:
    """The reference of prompts 0 and 2 is what the model says, of 1 and 3 something else."""
    references = [text if i % 2 == 0 else "?" for i, text in enumerate(_answers(model))]
    examples = [Example(prompt, reference) for prompt, reference in zip(PROMPTS, references, strict=True)]
    task = Task("t", [], examples, lambda example, answer: 1.0 if answer == example.answer.strip() else 0.25)
    records = evaluate_model(model, TOKENIZER, task, max_new_tokens=6, batch_size=2)
    assert records == [
        {"prompt": prompt, "completion": text, "answer": reference, "score": score, "correct": score == 1.0}
        for prompt, text, reference, score in zip(
            PROMPTS, _answers(model), references, [1.0, 0.25, 1.0, 0.25], strict=True
        )
    ]
    assert json.loads(json.dumps(records)) == records


def test_evaluate_model_does_not_depend_on_the_batch_size(model: Any) -> None:
    task = Task("t", [], [Example(prompt, "1") for prompt in PROMPTS], lambda example, answer: 0.0)
    records = [evaluate_model(model, TOKENIZER, task, max_new_tokens=6, batch_size=size) for size in (1, 3, 64)]
    assert records[0] == records[1] == records[2]


def test_evaluate_model_needs_held_out_examples(model: Any) -> None:
    with pytest.raises(TaskError, match=r"no held-out examples\. Set task\.num_eval"):
        evaluate_model(model, TOKENIZER, Task("t", [], [], lambda example, answer: 0.0), max_new_tokens=6, batch_size=2)
