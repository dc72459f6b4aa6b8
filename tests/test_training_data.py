"""The base is sampled once: what learns from its samples shares them, and nothing else does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from subnet_ft import training_data
from subnet_ft.errors import StageError, SubnetError
from subnet_ft.inputs import RunInputs
from subnet_ft.pipeline import load_checked_recipe
from subnet_ft.training_data import training_dataset

SMALL = ["task.num_train=40", "task.num_eval=5", "task.pairs.num_prompts=30", "task.pairs.num_samples=16"]
COLUMNS = {
    "dpo": ["prompt", "chosen", "rejected"],
    "orpo": ["prompt", "chosen", "rejected"],
    "simpo": ["prompt", "chosen", "rejected"],
    "kto": ["prompt", "completion", "label"],
    "raft": ["prompt", "completion"],
}


@pytest.fixture
def draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Start with an empty cache, and count how often the base is sampled."""
    monkeypatch.setenv("SUBNET_FT_CACHE", str(tmp_path / "cache"))
    sample, counted = training_data.sample_completions, []

    def count(*args: Any, **options: Any) -> Any:
        counted.append(1)
        return sample(*args, **options)

    monkeypatch.setattr(training_data, "sample_completions", count)
    return counted


def data_of(name: str, folder: Path, *overrides: str) -> Any:
    recipe = load_checked_recipe(f"tiny/{name}", [*SMALL, f"output={folder}", *overrides])
    return training_dataset(RunInputs(recipe), folder, overwrite=False, progress=False)


def test_training_dataset_samples_once_for_all_algorithms(tmp_path: Path, draws: list[int]) -> None:
    data = {name: data_of(name, tmp_path / name) for name in COLUMNS}
    assert len(draws) == 1
    assert {name: made.column_names for name, made in data.items()} == COLUMNS
    assert data["dpo"].to_list() == data["orpo"].to_list() == data["simpo"].to_list()
    assert len(data["kto"]) == 30 * 16
    labelled = {(row["prompt"], row["completion"]): row["label"] for row in data["kto"]}
    assert all(labelled[row["prompt"], row["chosen"]] for row in data["dpo"])
    assert not any(labelled[row["prompt"], row["rejected"]] for row in data["dpo"])
    assert all(labelled[row["prompt"], row["completion"]] for row in data["raft"])
    assert {row["prompt"] for row in data["dpo"]} <= {row["prompt"] for row in data["raft"]}
    copies = {(tmp_path / name / "samples" / "samples.json").read_text() for name in COLUMNS}
    assert len(copies) == 1


def test_training_dataset_needs_no_cache_once_a_run_has_its_samples(tmp_path: Path, draws: list[int]) -> None:
    before = data_of("dpo", tmp_path / "run").to_list()
    for path in (tmp_path / "cache" / "samples").rglob("samples.json"):
        path.write_text("[]")
    assert data_of("dpo", tmp_path / "run").to_list() == before
    assert len(draws) == 1


@pytest.mark.parametrize(
    "override",
    [
        "seed=5",
        "task.pairs.temperature=0.9",
        "task.pairs.num_samples=20",
        "task.pairs.batch_size=100",
        "task.pairs.max_new_tokens=3",
        "task.prompt='{target_letter} of {span[0]}: '",
        r"task.answer_pattern='(\d\d?)'",
        "task.params={min_words: 1, max_words: 2}",
        "model.name=tiny:qwen3",
        "model.dtype=float32",
    ],
)
def test_training_dataset_samples_again_for_other_samples(override: str, tmp_path: Path) -> None:
    digests = [
        training_data._cache_key(
            RunInputs(load_checked_recipe("tiny/kto", [*SMALL, f"output={tmp_path}", *more])).of_samples()
        )
        for more in ([], [override])
    ]
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("name", "override"),
    [("dpo", "training.beta=0.5"), ("raft", "task.pairs.max_right=3"), ("dpo", "evaluation.margin=0.2"),
     ("dpo", "subnet.source.tolerance=0.5"), ("dpo", "task.rewards=[score]")],
)  # fmt: skip
def test_training_dataset_keeps_samples_when_something_else_changed(
    name: str, override: str, tmp_path: Path, draws: list[int]
) -> None:
    data_of(name, tmp_path / "run")
    data_of(name, tmp_path / "run", override)
    assert len(draws) == 1


def test_training_dataset_refuses_other_samples_in_the_same_run(tmp_path: Path, draws: list[int]) -> None:
    data_of("dpo", tmp_path / "run")
    with pytest.raises(StageError, match=r"sampling\.temperature: was 1\.0, is 0\.5"):
        data_of("dpo", tmp_path / "run", "task.pairs.temperature=0.5")
    assert len(draws) == 1


def test_training_dataset_of_raft_has_as_many_samples_as_asked_for(tmp_path: Path, draws: list[int]) -> None:
    one = data_of("raft", tmp_path / "one")
    more = data_of("raft", tmp_path / "more", "task.pairs.max_right=5")
    samples = json.loads((tmp_path / "one" / "samples" / "samples.json").read_text())
    right = [{sample["text"] for sample in prompt["completions"] if sample["right"]} for prompt in samples]
    assert len(one) == sum(bool(texts) for texts in right)
    assert len(more) == sum(min(len(texts), 5) for texts in right)


def test_training_dataset_of_sft_is_the_task_itself(tmp_path: Path) -> None:
    recipe = load_checked_recipe("tiny/sft", [*SMALL[:2], f"output={tmp_path}", "task.completion='{answer}!'"])
    inputs = RunInputs(recipe)
    data = training_dataset(inputs, tmp_path, overwrite=False, progress=False)
    assert inputs.data.task is not None
    expected = [{"prompt": one.prompt, "completion": f"{one.answer}!"} for one in inputs.data.task.train]
    assert data.to_list() == expected
    assert not (tmp_path / "samples").exists()


@pytest.fixture
def writings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Start with an empty cache, and count how often a teacher writes."""
    monkeypatch.setenv("SUBNET_FT_CACHE", str(tmp_path / "cache"))
    write, counted = training_data.write_rationales, []

    def count(*args: Any, **options: Any) -> Any:
        counted.append(1)
        return write(*args, **options)

    monkeypatch.setattr(training_data, "write_rationales", count)
    return counted


# Whatever a random teacher writes is a rationale, and its last character the answer.
EXPLAINED = [
    *SMALL[:2], "teacher.name=tiny:qwen3", "task.rationales.num_prompts=12", "task.rationales.answer_pattern='(.)$'",
    "task.rationales.rationale_pattern='(?s)(.+)'", "task.rationales.keep=all", "task.rationales.temperature=1.0",
]  # fmt: skip


def explained(folder: Path, *overrides: str) -> Any:
    recipe = load_checked_recipe("tiny/distilling_step_by_step", [*EXPLAINED, f"output={folder}", *overrides])
    return training_dataset(RunInputs(recipe), folder, overwrite=False, progress=False)


def test_training_dataset_lets_the_teacher_write_once(tmp_path: Path, writings: list[int]) -> None:
    first = explained(tmp_path / "a")
    texts = json.loads((tmp_path / "a" / "rationales" / "rationales.json").read_text())
    kept = [row["text"].strip() for row in texts if re.search(".$", row["text"]) and row["text"].strip()]
    assert len(texts) == 12
    assert len(first) == 2 * len(kept) > 12
    assert first.column_names == ["prompt", "completion", "is_rationale"]
    assert [row["completion"] for row in first][1::2] == kept
    assert all(row["prompt"].startswith("[label] ") for row in list(first)[::2])
    assert explained(tmp_path / "b").to_list() == first.to_list()
    # What is found in the texts, and what is made of it, costs no new text.
    other = explained(tmp_path / "b", "task.rationales.label_prefix='A '", "task.rationales.answer_pattern='^(.)'")
    assert other[0]["prompt"].startswith("A ")
    assert len(writings) == 1


@pytest.mark.parametrize(
    "override",
    ["teacher.name=tiny:mistral", "task.rationales.prompt='{span[0]} has {target_letter}'", "seed=3",
     "task.rationales.max_new_tokens=7", "task.rationales.num_prompts=13", "task.rationales.temperature=0.5"],
)  # fmt: skip
def test_training_dataset_asks_the_teacher_again_for_other_texts(
    override: str, tmp_path: Path, writings: list[int]
) -> None:
    explained(tmp_path / "run")
    with pytest.raises(StageError, match="was made with other settings"):
        explained(tmp_path / "run", override)
    explained(tmp_path / "other", override)
    assert len(writings) == 2


def test_inputs_of_training_change_with_the_teacher(tmp_path: Path) -> None:
    def inputs(*overrides: str) -> dict[str, Any]:
        return RunInputs(load_checked_recipe("tiny/distillation", [f"output={tmp_path}", *overrides])).of_training(
            None, "full"
        )

    first = inputs("teacher.name=tiny:qwen3")
    assert first == inputs("teacher.name=tiny:qwen3")
    assert first != inputs("teacher.name=tiny:mistral")
    assert first != inputs("teacher.name=tiny:qwen3", "teacher.dtype=float32")
    assert "teacher" not in RunInputs(load_checked_recipe("tiny/sft", [f"output={tmp_path}"])).of_training(None, "full")


def test_inputs_check_that_the_teacher_is_there(tmp_path: Path) -> None:
    recipe = load_checked_recipe("tiny/distillation", [f"output={tmp_path}", f"teacher.name={tmp_path / 'nobody'}"])
    with pytest.raises(SubnetError, match="nobody"):
        RunInputs(recipe).check()
