"""Tasks from local files and folders: templates, references, splits, and messages that name the columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from subnet_ft.errors import TaskError
from subnet_ft.recipe import DatasetSpec, TaskSpec
from subnet_ft.tasks import load_task

ROWS = [
    {"question": f"{i} + {i}?", "answer": f"{i} + {i} = {2 * i:,}\n#### {2 * i:,}", "level": i % 3} for i in range(600)
]
GSM8K = {"prompt": "Q: {question}\nA:", "answer_pattern": r"#### (-?[\d,]+)"}


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def hub_spec(
    path: str | Path, *, eval_split: str = "train", num_train: int = 40, num_eval: int = 10, **fields: Any
) -> TaskSpec:
    dataset = DatasetSpec(path=str(path), eval_split=eval_split)
    return TaskSpec(name="dataset", dataset=dataset, num_train=num_train, num_eval=num_eval, **fields)


def test_load_task_finds_reference_and_answer_by_one_pattern(tmp_path: Path) -> None:
    task = load_task(hub_spec(write_jsonl(tmp_path / "d.jsonl", ROWS), num_train=580, **GSM8K), seed=0)
    example = next(example for example in task.train if example.fields["question"] == "555 + 555?")
    assert (example.prompt, example.answer) == ("Q: 555 + 555?\nA:", "1,110")
    assert task.score(example, "so\n#### 1110\n#### 7") == 1.0
    assert task.score(example, "#### 1,110") == 1.0
    assert task.score(example, "#### 1111") == 0.0
    assert task.score(example, "1110") == 0.0


def test_load_task_holds_examples_out_of_the_same_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*ROWS[:50], *ROWS[:50]])
    task = load_task(hub_spec(path, **GSM8K), seed=0)
    prompts = [example.prompt for example in [*task.train, *task.evaluation]]
    assert (len(task.train), len(task.evaluation), len(set(map(str, prompts)))) == (40, 10, 50)


def test_load_task_keeps_held_out_prompts_out_of_training(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d" / "train.jsonl", ROWS[:50])
    write_jsonl(tmp_path / "d" / "test.jsonl", ROWS[40:60])
    task = load_task(hub_spec(tmp_path / "d", eval_split="test", num_train=40, num_eval=20, **GSM8K), seed=0)
    assert {e.fields["question"] for e in task.train} == {row["question"] for row in ROWS[:40]}
    assert {e.fields["question"] for e in task.evaluation} == {row["question"] for row in ROWS[40:60]}


def test_load_task_is_decided_by_the_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    assert load_task(hub_spec(path, **GSM8K), seed=1).train == load_task(hub_spec(path, **GSM8K), seed=1).train
    assert load_task(hub_spec(path, **GSM8K), seed=1).train != load_task(hub_spec(path, **GSM8K), seed=2).train


# pandas before 3.1 leaves the CSV that datasets reads to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_load_task_reads_files(tmp_path: Path, suffix: str) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(8)])
    path = tmp_path / f"d.{suffix}"
    {"json": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](str(path))
    task = load_task(hub_spec(path, num_train=6, num_eval=2), seed=0)
    assert sorted((e.prompt, e.answer) for e in [*task.train, *task.evaluation]) == [
        (f"{i} + 1 =", str(i + 1)) for i in range(8)
    ]


def test_load_task_accepts_messages_as_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "gold": str(i)} for i in range(4)]
    spec = hub_spec(
        write_jsonl(tmp_path / "d.jsonl", rows), num_train=4, num_eval=0, answer="{gold}", system_prompt="Hi"
    )
    for example in load_task(spec, seed=0).train:
        assert example.prompt == [
            {"role": "system", "content": "Hi"},
            {"role": "user", "content": f"{example.answer}?"},
        ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"no column `prompt`; its columns are question, answer, level\. Set task\.prompt .*'\{question\}'"),
        ({"prompt": "{questoin}"}, r"asks for `questoin`, .* question, answer, level\. Did you mean `question`\?"),
        ({"prompt": "{question}", "answer": "{gold}"}, r"task\.answer asks for `gold`"),
        ({"prompt": "{question}", "answer_pattern": r"The answer is (\d+)"}, r"finds nothing in '.*#### .*'\. Correct"),
        (
            {**GSM8K, "num_train": 700},
            r"has 600 rows, of which 590 have a prompt not used before, but task\.num_train asks for 700",
        ),
        (
            {**GSM8K, "eval_split": "test"},
            r"Split `test` of .* cannot be loaded: Unknown split .*give eval_split the same name",
        ),
    ],
)
def test_load_task_explains_what_is_wrong_with_the_data(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_task(hub_spec(write_jsonl(tmp_path / "d.jsonl", ROWS), **fields), seed=0)


def test_load_task_explains_missing_data(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="there is no such file"):
        load_task(hub_spec(tmp_path / "none.jsonl"), seed=0)
    with pytest.raises(TaskError, match=r"`some/where` cannot be loaded: .*Check task\.dataset"):
        load_task(hub_spec("some/where"), seed=0)
    with pytest.raises(TaskError, match=r"task\.dataset\.path"):
        load_task(TaskSpec(name="dataset"), seed=0)


def test_load_task_refuses_a_row_without_a_reference(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "1?", "answer": "1"}, {"prompt": "2?", "answer": None}])
    with pytest.raises(TaskError, match=r"Row 1 of .*: task\.answer asks for `answer`, which is empty"):
        load_task(hub_spec(path, num_train=2, num_eval=0), seed=0)
