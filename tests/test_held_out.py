"""What models are judged on: no held-out pair is about a training prompt, and its samples are drawn once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from subnet_ft import training_data
from subnet_ft.base_stage import make_base
from subnet_ft.errors import StageError, TaskError
from subnet_ft.held_out import HeldOutPairs, held_out, judge
from subnet_ft.inputs import RunInputs
from subnet_ft.pipeline import load_checked_recipe
from subnet_ft.tasks import Task
from subnet_ft.training_data import training_dataset

SMALL = ["task.num_train=40", "task.num_eval=30", "task.pairs.num_prompts=40", "task.pairs.num_samples=16"]


def inputs_of(name: str, folder: Path, *overrides: str) -> RunInputs:
    return RunInputs(load_checked_recipe(f"tiny/{name}", [*SMALL, f"output={folder}", *overrides]))


@pytest.fixture
def draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Start with an empty cache, and record of every sampling whether it is of held-out prompts."""
    monkeypatch.setenv("SUBNET_FT_CACHE", str(tmp_path / "cache"))
    sample, counted = training_data.sample_completions, []

    def count(*args: Any, **options: Any) -> Any:
        counted.append(options["held_out"])
        return sample(*args, **options)

    monkeypatch.setattr(training_data, "sample_completions", count)
    return counted


def pairs_of(inputs: RunInputs, folder: Path | None = None) -> HeldOutPairs:
    found = held_out(inputs, folder)
    assert isinstance(found, HeldOutPairs)
    return found


def test_held_out_pairs_are_of_held_out_prompts(tmp_path: Path, draws: list[bool]) -> None:
    inputs = inputs_of("reward", tmp_path)
    pairs = pairs_of(inputs, tmp_path)
    assert draws == [True]
    assert inputs.data.task is not None
    examples = {example.prompt: example for example in inputs.data.task.evaluation}
    assert (len(examples), pairs.num_prompts) == (30, 30)
    assert 3 < len(pairs.rows) < 30
    for row in pairs.rows:
        example = examples[row["prompt"]]
        assert inputs.data.task.is_correct(example, row["chosen"])
        assert not inputs.data.task.is_correct(example, row["rejected"])
    training = training_dataset(inputs, tmp_path, overwrite=False, progress=False)
    assert not set(training["prompt"]) & examples.keys()
    assert draws == [True, False]


def test_held_out_pairs_say_how_many_prompts_gave_none(
    tmp_path: Path, draws: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "subnet_ft"):
        pairs = pairs_of(inputs_of("reward", tmp_path))
    left_out = 30 - len(pairs.rows)
    assert f"{len(pairs.rows)} pairs from 30 prompts" in caplog.text
    (sentence,) = pairs.not_measured
    assert sentence.startswith(f"{left_out} of the 30 held-out prompts")
    assert HeldOutPairs(pairs.rows, len(pairs.rows)).not_measured == []
    assert HeldOutPairs(pairs.rows).not_measured == []


def test_held_out_samples_once_with_and_without_a_run(tmp_path: Path, draws: list[bool]) -> None:
    first = pairs_of(inputs_of("reward", tmp_path / "a"), tmp_path / "a")
    assert pairs_of(inputs_of("reward", tmp_path / "b"), tmp_path / "b") == first
    assert pairs_of(inputs_of("reward", tmp_path / "c")) == first
    assert not (tmp_path / "c").exists()
    assert draws == [True]
    # How many training prompts are sampled changes nothing about the held-out ones.
    assert pairs_of(inputs_of("reward", tmp_path / "d", "task.pairs.num_prompts=20")) == first
    assert draws == [True]
    with pytest.raises(StageError, match=r"sampling\.temperature: was 1\.0, is 0\.5"):
        held_out(inputs_of("reward", tmp_path / "a", "task.pairs.temperature=0.5"), tmp_path / "a")


def test_held_out_shares_training_samples_with_dpo(tmp_path: Path) -> None:
    assert inputs_of("reward", tmp_path).of_samples() == inputs_of("dpo", tmp_path).of_samples()


def test_held_out_refuses_too_few_pairs(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="at least 10% of the prompts must give one"):
        held_out(inputs_of("reward", tmp_path, "task.pairs.num_samples=2", "task.pairs.temperature=0.01"))


def test_held_out_of_a_dataset_is_its_eval_split_without_training_prompts(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i // 2}", "chosen": f"a{i}", "rejected": "b"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = f"{{name: dataset, dataset: {{path: {path}, eval_split: train}}, num_train: 20, num_eval: 15}}"
    inputs = RunInputs(load_checked_recipe("tiny/reward", [f"task={task}", f"output={tmp_path}"]))
    pairs = pairs_of(inputs)
    assert inputs.data.rows is not None
    assert (len(inputs.data.rows), len(pairs.rows), pairs.num_prompts) == (20, 15, None)
    assert not {row["prompt"] for row in pairs.rows} & set(inputs.data.rows["prompt"])
    assert all(row in rows for row in pairs.rows)


def test_held_out_is_a_task_for_models_that_write(tmp_path: Path) -> None:
    found = held_out(inputs_of("dpo", tmp_path))
    assert isinstance(found, Task)
    assert len(found.evaluation) == 30
    assert held_out(inputs_of("dpo", tmp_path, "evaluation.enabled=false")) is None
    assert held_out(inputs_of("reward", tmp_path, "evaluation.enabled=false")) is None


def test_judge_scores_pairs_and_answers_prompts(tmp_path: Path) -> None:
    inputs = inputs_of("reward", tmp_path)
    make_base(inputs, tmp_path, overwrite=False)
    pairs = pairs_of(inputs)
    records = judge(inputs.base.folder, inputs, pairs)
    assert [record["prompt"] for record in records] == [row["prompt"] for row in pairs.rows]
    assert all("chosen_reward" in record for record in records)
    writer = inputs_of("dpo", tmp_path)
    task = held_out(writer)
    assert task is not None
    answers = judge(writer.language_model.folder, writer, task)
    assert (len(answers), set(answers[0])) == (30, {"prompt", "completion", "answer", "score", "correct"})
