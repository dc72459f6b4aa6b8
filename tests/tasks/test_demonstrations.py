"""Demonstrations: prompts with completions, from a task's answers, a template, or the column `completion`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from subnet_ft.errors import TaskError
from subnet_ft.recipe import DatasetSpec, TaskSpec
from subnet_ft.tasks import Example, Task, demonstration_dataset, load_task


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def sums(**fields: Any) -> TaskSpec:
    params = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    return TaskSpec(name="reasoning_gym/chain_sum", params=params, num_train=20, num_eval=5, **fields)


def rows_of(spec: TaskSpec) -> list[dict[str, Any]]:
    data = demonstration_dataset(load_task(spec, seed=0), spec)
    assert data.column_names == ["prompt", "completion"]
    return list(data.to_list())


def from_rows(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> TaskSpec:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TaskSpec(name="dataset", dataset=DatasetSpec(path=str(path)), num_train=len(rows), **fields)


def test_demonstrations_are_the_reference_answers_of_the_training_prompts() -> None:
    spec = sums(prompt="{expression} =")
    rows = rows_of(spec)
    assert len(rows) == 20
    for row in rows:
        a, sign, b = row["prompt"].removesuffix(" =").split()
        assert int(row["completion"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_demonstrations_fill_a_template_over_the_fields_of_an_example() -> None:
    rows = rows_of(sums(prompt="{expression} =", completion=" {answer}, for {expression}"))
    plain = rows_of(sums(prompt="{expression} ="))
    for row, bare in zip(rows, plain, strict=True):
        expression = row["prompt"].removesuffix(" =")
        assert row["completion"] == f" {bare['completion']}, for {expression}"


def test_demonstrations_are_messages_for_chat_prompts() -> None:
    for row in rows_of(sums(chat=True)):
        assert [message["role"] for message in row["prompt"] + row["completion"]] == ["user", "assistant"]


def test_demonstrations_of_a_dataset_are_its_completions_word_for_word(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + 1?", "completion": f" We get {i + 1}.\n#### {i + 1}"} for i in range(5)]
    spec = from_rows(tmp_path, rows, answer_pattern=r"#### (\d+)")
    assert sorted(rows_of(spec), key=str) == rows
    task = load_task(spec, seed=0)
    assert {example.answer for example in task.train} == {"1", "2", "3", "4", "5"}


def test_demonstrations_of_a_dataset_keep_messages(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}?"}],
            "completion": [{"role": "assistant", "content": f"It is {i}"}],
        }
        for i in range(4)
    ]
    spec = from_rows(tmp_path, rows, answer_pattern=r"(\d+)")
    assert sorted(rows_of(spec), key=str) == rows
    assert {example.answer for example in load_task(spec, seed=0).train} == {"0", "1", "2", "3"}


def test_demonstrations_of_questions_with_solutions_take_a_template(tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1?", "answer": f"We get {i + 1}.\n#### {i + 1}"} for i in range(5)]
    spec = from_rows(tmp_path, rows, prompt="{question}\n", completion="{answer}", answer_pattern=r"#### (\d+)")
    expected = [{"prompt": f"{row['question']}\n", "completion": row["answer"]} for row in rows]
    assert sorted(rows_of(spec), key=str) == expected


def test_demonstrations_need_something_to_copy() -> None:
    task = Task("reasoning_gym/x", [Example("?", "", {"question": "?", "answer": None, "metadata": {}})], [], None)  # type: ignore[arg-type]
    spec = TaskSpec(name="reasoning_gym/x")
    with pytest.raises(TaskError, match=r"reference answer is empty\. Set task\.completion"):
        demonstration_dataset(task, spec)
    with pytest.raises(TaskError, match=r"task\.completion asks for `anser`.*Did you mean `answer`"):
        rows_of(sums(completion="{anser}"))
