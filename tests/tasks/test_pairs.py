"""Sampled pairs hold a right and a wrong completion of one prompt, in the format of TRL's preference trainers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.errors import TaskError
from subnet_ft.recipe import PairsSpec
from subnet_ft.tasks import Example, Task, sample_pairs
from subnet_ft.tasks.pairs import cut_after_answer

SPEC = PairsSpec(num_prompts=6, num_samples=6, temperature=1.0, max_new_tokens=6, batch_size=12)


def _is_early(example: Example, answer: str) -> float:
    """Call an answer right whose first character comes early: about half of what a random model writes."""
    return float(answer[0] < "M")


def pair_task(prompts: list[Any], verifier: Any = _is_early, pattern: str | None = None) -> Task:
    compiled = None if pattern is None else re.compile(pattern)
    return Task("coin", [Example(prompt, "") for prompt in prompts], [], verifier, compiled)


TASK = pair_task([f"{i} + {10 * i} =" for i in range(8)])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", dtype=torch.float32)


def pairs(model: Any, task: Task = TASK, spec: PairsSpec = SPEC, seed: int = 0) -> list[dict[str, Any]]:
    data = sample_pairs(model, tiny_tokenizer(), task, spec, seed=seed)
    assert data.column_names == ["prompt", "chosen", "rejected"]
    return list(data.to_list())


def test_sample_pairs_are_right_against_wrong(model: Any) -> None:
    rows = pairs(model)
    assert len(rows) > 2
    prompts = [row["prompt"] for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert set(prompts) <= {example.prompt for example in TASK.train[:6]}
    for row in rows:
        example = next(example for example in TASK.train if example.prompt == row["prompt"])
        assert TASK.is_correct(example, row["chosen"])
        assert not TASK.is_correct(example, row["rejected"])


def test_sample_pairs_are_decided_by_the_seed(model: Any) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert pairs(model, seed=1) == pairs(model, seed=1)
    assert pairs(model, seed=1) != pairs(model, seed=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_sample_pairs_are_messages_for_chat_prompts(model: Any) -> None:
    prompts = [[{"role": "user", "content": str(i)}] for i in range(6)]
    for row in pairs(model, pair_task(prompts)):
        assert row["prompt"] in prompts
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]


def test_sample_pairs_counts_what_came_out_when_it_is_too_little(model: Any) -> None:
    with pytest.raises(TaskError, match=r"gave 0 pairs from 6 prompts \(0 all right, 6 all wrong\).*easier"):
        pairs(model, pair_task(["1"] * 6, lambda example, answer: 0.0))
    with pytest.raises(TaskError, match=r"num_prompts is 6, but the task has 2 training examples"):
        pairs(model, pair_task(["1", "2"]))


@pytest.mark.parametrize(
    ("pattern", "completion", "kept"),
    [
        (r"(-?\d+)", " 45\n71 - 26 = 45", " 45"),
        (r"(-?\d+)", " 45 apples.\nMore", " 45 apples."),
        (r"(-?\d+)", " none\nmore", " none\nmore"),
        (r"(-?\d+)\n", " 45\nmore", " 45\nmore"),
        (None, " 45\nmore", " 45\nmore"),
    ],
)
def test_cut_after_answer_drops_later_lines_but_never_changes_the_score(
    pattern: str | None, completion: str, kept: str
) -> None:
    task = pair_task(["?"], lambda example, answer: float(answer == "45"), pattern)
    assert cut_after_answer(task, task.train[0], completion) == kept


def test_sample_pairs_prefers_a_wrong_completion_with_an_answer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(*args: Any, **kwargs: Any) -> list[list[str]]:
        return [[" dunno", " 46\nx", " 45\nx"]]

    monkeypatch.setattr("subnet_ft.tasks.pairs.generate", say)
    task = pair_task(["5 * 9 ="], lambda example, answer: float(answer == "45"), r"^\s*(\d+)")
    spec = PairsSpec(num_prompts=1, num_samples=3, max_new_tokens=4)
    assert pairs(model, task, spec) == [{"prompt": "5 * 9 =", "chosen": " 45", "rejected": " 46"}]
