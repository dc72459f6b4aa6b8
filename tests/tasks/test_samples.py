"""One set of scored samples gives pairs, labelled and right completions, each in the format of TRL's trainers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.errors import TaskError
from subnet_ft.recipe import PairsSpec
from subnet_ft.tasks import Example, Task, dataset_of_samples, generate, sample_completions
from subnet_ft.tasks.samples import cut_after_answer

COLUMNS = {
    "preferences": ["prompt", "chosen", "rejected"],
    "labelled": ["prompt", "completion", "label"],
    "samples": ["prompt", "completion"],
}
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


def made_of_samples(
    data: str, model: Any, task: Task = TASK, spec: PairsSpec = SPEC, seed: int = 0
) -> list[dict[str, Any]]:
    samples = sample_completions(model, tiny_tokenizer(), task, spec, seed=seed)
    made = dataset_of_samples(samples, data, spec, seed=seed)
    assert made.column_names == COLUMNS[data]
    return list(made.to_list())


def pairs(*args: Any, **options: Any) -> list[dict[str, Any]]:
    return made_of_samples("preferences", *args, **options)


def test_preference_pairs_are_right_against_wrong(model: Any) -> None:
    rows = pairs(model)
    assert len(rows) > 2
    prompts = [row["prompt"] for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert set(prompts) <= {example.prompt for example in TASK.train[:6]}
    for row in rows:
        example = next(example for example in TASK.train if example.prompt == row["prompt"])
        assert TASK.is_correct(example, row["chosen"])
        assert not TASK.is_correct(example, row["rejected"])


def test_preference_pairs_are_those_of_the_first_release(model: Any) -> None:
    """The rule as it was when only pairs were sampled, on the same draws."""
    examples = TASK.train[: SPEC.num_prompts]
    draws = generate(
        model,
        tiny_tokenizer(),
        [example.prompt for example in examples],
        max_new_tokens=SPEC.max_new_tokens,
        temperature=SPEC.temperature,
        num_samples=SPEC.num_samples,
        batch_size=SPEC.batch_size,
        seed=3,
    )
    expected = []
    for example, completions in zip(examples, draws, strict=True):
        right = [text for text in completions if TASK.is_correct(example, text)]
        wrong = [text for text in completions if not TASK.is_correct(example, text)]
        if right and wrong:
            expected.append({"prompt": example.prompt, "chosen": right[0], "rejected": wrong[0]})
    assert len(expected) > 2
    assert pairs(model, seed=3) == expected


def test_labelled_completions_are_all_samples_in_a_seeded_order(model: Any) -> None:
    samples = sample_completions(model, tiny_tokenizer(), TASK, SPEC, seed=0)
    rows = made_of_samples("labelled", model)
    assert len(rows) == SPEC.num_prompts * SPEC.num_samples
    assert {row["label"] for row in rows} == {True, False}
    key = [(one["prompt"], sample["text"], sample["right"]) for one in samples for sample in one["completions"]]
    ours = [(row["prompt"], row["completion"], row["label"]) for row in rows]
    assert sorted(ours) == sorted(key)
    assert ours != key  # or neighbours would be samples of one prompt
    assert rows == dataset_of_samples(samples, "labelled", SPEC, seed=0).to_list()
    assert rows != dataset_of_samples(samples, "labelled", SPEC, seed=1).to_list()


@pytest.mark.parametrize("max_right", [None, 1, 2, 9])
def test_right_completions_are_different_ones_up_to_a_number(model: Any, max_right: int | None) -> None:
    spec = replace(SPEC, max_right=max_right)
    samples = sample_completions(model, tiny_tokenizer(), TASK, spec, seed=0)
    rows = made_of_samples("samples", model, TASK, spec)
    expected = []
    for one in samples:
        right = [sample["text"] for sample in one["completions"] if sample["right"]]
        different = [text for index, text in enumerate(right) if text not in right[:index]]
        expected += [{"prompt": one["prompt"], "completion": text} for text in different[: max_right or 1]]
    assert rows == expected
    assert all(TASK.is_correct(TASK.train[0], row["completion"]) for row in rows)


def test_right_completions_count_a_text_once() -> None:
    samples = [{"prompt": "1 =", "completions": [{"text": text, "right": True, "answered": True} for text in "1213"]}]
    made = dataset_of_samples(samples, "samples", replace(SPEC, max_right=2), seed=0)
    assert [row["completion"] for row in made] == ["1", "2"]


@pytest.mark.parametrize("data", ["labelled", "samples"])
def test_samples_are_messages_for_chat_prompts(model: Any, data: str) -> None:
    prompts = [[{"role": "user", "content": str(i)}] for i in range(6)]
    for row in made_of_samples(data, model, pair_task(prompts)):
        assert row["prompt"] in prompts
        assert [message["role"] for message in row["completion"]] == ["assistant"]


@pytest.mark.parametrize(
    ("data", "rights", "message"),
    [
        ("labelled", [0, 0], "Of 400 sampled completions 0 are right.*easier"),
        ("labelled", [1, 2], "Of 400 sampled completions 3 are right.*easier"),
        ("labelled", [199, 198], "Of 400 sampled completions 397 are right.*harder"),
        ("samples", [0] * 20 + [1], "gave 1 prompts with a right completion from 21 prompts.*easier"),
        ("preferences", [200] * 20 + [1], "gave 1 pairs from 21 prompts.*harder"),
    ],
)
def test_dataset_of_samples_refuses_too_few_of_one_kind(data: str, rights: list[int], message: str) -> None:
    samples = [
        {
            "prompt": f"{index} =",
            "completions": [{"text": str(i), "right": i < right, "answered": True} for i in range(200)],
        }
        for index, right in enumerate(rights)
    ]
    with pytest.raises(TaskError, match=message):
        dataset_of_samples(samples, data, SPEC, seed=0)


def test_preference_pairs_are_decided_by_the_seed(model: Any) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert pairs(model, seed=1) == pairs(model, seed=1)
    assert pairs(model, seed=1) != pairs(model, seed=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_preference_pairs_are_messages_for_chat_prompts(model: Any) -> None:
    prompts = [[{"role": "user", "content": str(i)}] for i in range(6)]
    for row in pairs(model, pair_task(prompts)):
        assert row["prompt"] in prompts
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]


def test_preference_pairs_counts_what_came_out_when_it_is_too_little(model: Any) -> None:
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


def test_preference_pairs_prefers_a_wrong_completion_with_an_answer(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(*args: Any, **kwargs: Any) -> list[list[str]]:
        return [[" dunno", " 46\nx", " 45\nx"]]

    monkeypatch.setattr("subnet_ft.tasks.samples.generate", say)
    task = pair_task(["5 * 9 ="], lambda example, answer: float(answer == "45"), r"^\s*(\d+)")
    spec = PairsSpec(num_prompts=1, num_samples=3, max_new_tokens=4)
    assert pairs(model, task, spec) == [{"prompt": "5 * 9 =", "chosen": " 45", "rejected": " 46"}]
