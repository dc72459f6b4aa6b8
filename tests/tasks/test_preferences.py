"""Preferences and labels keep TRL's formats and are refused by name when they have another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from subnet_ft.errors import TaskError
from subnet_ft.recipe import DatasetSpec, TaskSpec
from subnet_ft.tasks import labelled_dataset, preference_dataset
from subnet_ft.tasks.preferences import preference_key


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def _spec(folder: Path, rows: list[dict[str, Any]], num_train: int = 2, **fields: Any) -> TaskSpec:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TaskSpec(name="dataset", dataset=DatasetSpec(path=str(path)), num_train=num_train, **fields)


def _rows(data: Any) -> list[dict[str, Any]]:
    return sorted(data.to_list(), key=str)


TEXT = [{"prompt": f"{i} =", "chosen": f" {i}", "rejected": " 0", "source": "x"} for i in (1, 2, 3)]
USER = [{"role": "user", "content": "1 ="}]
RIGHT, WRONG = [{"role": "assistant", "content": " 1"}], [{"role": "assistant", "content": " 0"}]


def test_preference_dataset_keeps_text_and_the_first_rows_of_a_seeded_order(tmp_path: Path) -> None:
    data = preference_dataset(_spec(tmp_path, TEXT), seed=1)
    assert data.column_names == ["prompt", "chosen", "rejected"]
    assert len(data) == 2
    assert data.to_list() == preference_dataset(_spec(tmp_path, TEXT, 3), seed=1).to_list()[:2]


def test_preference_dataset_turns_text_into_messages_for_chat(tmp_path: Path) -> None:
    data = preference_dataset(_spec(tmp_path, TEXT[:1], 1, chat=True))
    assert data.to_list() == [{"prompt": USER, "chosen": RIGHT, "rejected": WRONG}]


def test_preference_dataset_keeps_an_implicit_prompt(tmp_path: Path) -> None:
    row = {"chosen": USER + RIGHT, "rejected": USER + WRONG}
    data = preference_dataset(_spec(tmp_path, [row], 1))
    assert data.to_list() == [row]


def test_preference_dataset_fills_a_template(tmp_path: Path) -> None:
    data = preference_dataset(_spec(tmp_path, TEXT, 3, prompt="[{source}] {prompt}"))
    assert [row["prompt"] for row in _rows(data)] == ["[x] 1 =", "[x] 2 =", "[x] 3 ="]


@pytest.mark.parametrize(
    ("rows", "num_train", "message"),
    [
        (
            [{"prompt": "1", "chosn": "2"}],
            1,
            "no column `chosen` and no column `rejected`; its columns are prompt, chosn",
        ),
        (TEXT, 4, "has 3 rows, but task.num_train asks for 4"),
        ([{"prompt": "1", "chosen": RIGHT, "rejected": WRONG}], 1, "holds prompt: str, chosen: list, rejected: list"),
        ([{"prompt": "1", "chosen": None, "rejected": "0"}], 1, "chosen: NoneType"),
    ],
)
def test_preference_dataset_explains_what_is_wrong(
    tmp_path: Path, rows: list[dict[str, Any]], num_train: int, message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        preference_dataset(_spec(tmp_path, rows, num_train))


LABELLED = [{"prompt": f"{i} =", "completion": f" {i}", "label": i % 2 == 0, "source": "x"} for i in range(6)]


def test_labelled_dataset_keeps_rows_that_have_labels(tmp_path: Path) -> None:
    data = labelled_dataset(_spec(tmp_path, LABELLED, 6), seed=1)
    assert data.column_names == ["prompt", "completion", "label"]
    assert _rows(data) == [{key: row[key] for key in ("prompt", "completion", "label")} for row in LABELLED]
    assert data.to_list() != _rows(data)
    assert data.to_list() == labelled_dataset(_spec(tmp_path, LABELLED, 6), seed=1).to_list()


def test_labelled_dataset_takes_labels_of_zero_and_one_and_a_template(tmp_path: Path) -> None:
    rows = [{"question": "1", "completion": " 1", "label": 1}, {"question": "2", "completion": " 3", "label": 0}]
    data = labelled_dataset(_spec(tmp_path, rows, 2, prompt="{question} =", chat=True))
    assert [row["label"] for row in _rows(data)] == [True, False]
    assert _rows(data)[0] == {"prompt": USER, "completion": RIGHT, "label": True}


@pytest.mark.parametrize("rows", [TEXT, [{"chosen": USER + RIGHT, "rejected": USER + WRONG}] * 3])
def test_labelled_dataset_makes_two_rows_of_a_preference(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    data = labelled_dataset(_spec(tmp_path, rows, 3), seed=0)
    assert len(data) == 6
    labels = [row["label"] for row in data]
    assert sum(labels) == 3
    assert labels not in ([True] * 3 + [False] * 3, [True, False] * 3)  # KTO reads rows in order
    for row in data:
        kinds = {True: "chosen", False: "rejected"}
        whole = row["prompt"] + row["completion"]
        assert whole in [pair.get("prompt", type(whole)()) + pair[kinds[row["label"]]] for pair in rows]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1", "completion": "2"}], "no column `chosen` and no column `rejected`.*Labels need"),
        ([{"prompt": "1", "label": True}], "no column `completion`.*Labelled completions need"),
        ([{"completion": "1", "label": True}], "must have a prompt"),
        ([{"prompt": "1", "completion": "2", "label": "good"}], "label that is true or false, but the label is 'good'"),
        ([{"chosen": "1 = 1", "rejected": "1 = 2"}], "no column `prompt`, so that its texts cannot be split"),
        ([{"prompt": "1", "completion": RIGHT, "label": True}], "holds prompt: str, completion: list"),
    ],
)
def test_labelled_dataset_explains_what_is_wrong(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        labelled_dataset(_spec(tmp_path, rows, 1))


def test_preference_dataset_holds_rows_out_of_the_split_that_it_trains_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i // 2} =", "chosen": f" {i}", "rejected": " ?"} for i in range(20)]
    spec = _spec(tmp_path, rows, 6, num_eval=7)
    spec = dataclasses.replace(spec, dataset=DatasetSpec(path=str(tmp_path / "d.jsonl"), eval_split="train"))
    training = preference_dataset(spec, seed=3)
    held_out = preference_dataset(spec, seed=3, part="eval", exclude={preference_key(row) for row in training})
    assert (len(training), len(held_out)) == (6, 7)
    assert not set(training["prompt"]) & set(held_out["prompt"])


def test_preference_dataset_says_when_too_few_rows_are_left_to_hold_out(tmp_path: Path) -> None:
    spec = _spec(tmp_path, TEXT, 2, num_eval=3)
    spec = dataclasses.replace(spec, dataset=DatasetSpec(path=str(tmp_path / "d.jsonl"), eval_split="train"))
    with pytest.raises(
        TaskError, match=r"3 rows, of which 1 are not about a training prompt.*task\.num_eval asks for 3"
    ):
        preference_dataset(spec, part="eval", exclude={preference_key(row) for row in preference_dataset(spec)})


def test_preference_key_is_the_prompt_wherever_it_stands() -> None:
    implicit = {"chosen": USER + RIGHT, "rejected": USER + WRONG}
    assert preference_key(implicit) == preference_key({"prompt": USER, "chosen": RIGHT, "rejected": WRONG})
    texts = [{"chosen": "a b", "rejected": "a c"}, {"chosen": "a b", "rejected": "a d"}]
    assert preference_key(texts[0]) != preference_key(texts[1])
