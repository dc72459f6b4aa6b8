"""Rationales of a teacher: what it is asked, what its texts say, and two rows for each that is kept."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from subnet_ft.checkpoints.tiny import tiny_model, tiny_tokenizer
from subnet_ft.errors import TaskError
from subnet_ft.recipe import RationalesSpec, TaskSpec
from subnet_ft.tasks import Example, Task, generate, rationale_dataset, teacher_prompts, write_rationales
from subnet_ft.tasks.rationales import Explained, find_rationale, put_before, with_prefix

WRITING = RationalesSpec(prompt="Explain {sum}", num_prompts=3, answer_pattern="so (-?[0-9]+)")
SPEC = TaskSpec(name="dataset", prompt="{sum} =", answer_pattern="([0-9]+)", rationales=WRITING)
SUMS = [("5 + 9", "14"), ("2 + 2", "4"), ("7 + 1", "8"), ("3 + 3", "6")]
TASK = Task(
    "dataset",
    [Example(f"{sum_} =", answer, {"sum": sum_, "answer": answer}) for sum_, answer in SUMS],
    [Example("1 + 1 =", "2", {"sum": "1 + 1", "answer": "2"})],
    lambda example, answer: float(answer == example.answer),
    re.compile("([0-9]+)"),
)
TEXTS = ["5 and 9 make 14, so 14", "2 twice, so 5", "no idea"]


def spec_with(task: dict[str, Any] | None = None, **rationales: Any) -> TaskSpec:
    return dataclasses.replace(SPEC, **(task or {}), rationales=dataclasses.replace(WRITING, **rationales))


def test_find_rationale_takes_what_stands_before_the_answer() -> None:
    assert find_rationale(TEXTS[0], SPEC) == Explained("5 and 9 make 14,", "14")
    assert find_rationale("so 14", SPEC) is None
    assert find_rationale("14 it is", SPEC) is None
    assert find_rationale(" \n so 3", SPEC) is None


def test_find_rationale_uses_its_own_pattern_and_the_answer_pattern_of_the_task() -> None:
    spec = spec_with(answer_pattern=None, rationale_pattern="because (.+)")
    assert find_rationale("14, because 5 and 9 make it", spec) == Explained("5 and 9 make it", "14")
    assert find_rationale("14, no more", spec) is None


def test_find_rationale_gives_up_on_a_pattern_that_backtracks() -> None:
    assert find_rationale("a" * 60 + "! so 3", spec_with(rationale_pattern="((?:a+)+)$")) is None


def test_rationale_dataset_has_two_rows_for_every_right_text() -> None:
    data = rationale_dataset(TASK, SPEC, TEXTS)
    assert data.to_list() == [
        {"prompt": "[label] 5 + 9 =", "completion": "14", "is_rationale": False},
        {"prompt": "[rationale] 5 + 9 =", "completion": "5 and 9 make 14,", "is_rationale": True},
    ]


def test_rationale_dataset_keeps_all_with_the_answer_of_the_teacher() -> None:
    rows = rationale_dataset(TASK, spec_with(keep="all"), TEXTS).to_list()
    assert [row["completion"] for row in rows] == ["14", "5 and 9 make 14,", "5", "2 twice,"]
    assert [row["is_rationale"] for row in rows] == [False, True, False, True]


def test_rationale_dataset_fills_templates_and_uses_the_prefixes_of_the_recipe() -> None:
    spec = spec_with(
        {"completion": " {sum} is {answer}"}, completion=" {rationale}!", label_prefix="A ", rationale_prefix="R "
    )
    rows = rationale_dataset(TASK, spec, TEXTS).to_list()
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        ("A 5 + 9 =", " 5 + 9 is 14"),
        ("R 5 + 9 =", " 5 and 9 make 14,!"),
    ]


def test_rationale_dataset_judges_a_bare_answer_whatever_the_pattern_of_the_task() -> None:
    task = dataclasses.replace(TASK, answer_pattern=re.compile("#### ([0-9]+)"))
    assert len(rationale_dataset(task, SPEC, TEXTS)) == 2


def test_rationale_dataset_writes_messages_for_chats() -> None:
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": one.prompt}] for one in TASK.train
    ]
    train = [dataclasses.replace(one, prompt=chat) for one, chat in zip(TASK.train, chats, strict=True)]
    rows = rationale_dataset(dataclasses.replace(TASK, train=train), SPEC, TEXTS).to_list()
    assert rows[1]["prompt"] == [chats[0][0], {"role": "user", "content": "[rationale] 5 + 9 ="}]
    assert rows[1]["completion"] == [{"role": "assistant", "content": "5 and 9 make 14,"}]


@pytest.mark.parametrize(("keep", "texts"), [("right", ["so so, so 1"] * 11), ("all", ["no idea"] * 11)])
def test_rationale_dataset_says_what_the_teacher_gave(keep: str, texts: list[str]) -> None:
    task = dataclasses.replace(TASK, train=TASK.train * 3)
    with pytest.raises(TaskError, match=rf"Of 11 texts of the teacher: \d+ with .*, 0 of them right.*`keep: {keep}`"):
        rationale_dataset(task, spec_with(keep=keep), texts)


def test_teacher_prompts_are_a_template_over_the_examples() -> None:
    assert teacher_prompts(TASK, SPEC) == ["Explain 5 + 9", "Explain 2 + 2", "Explain 7 + 1"]
    chat = spec_with({"chat": True, "system_prompt": "Be brief."}, chat=True, num_prompts=1)
    assert teacher_prompts(TASK, chat) == [[{"role": "user", "content": "Explain 5 + 9"}]]
    plain = spec_with({"chat": True, "system_prompt": "Be brief."}, num_prompts=1)
    assert teacher_prompts(TASK, plain) == ["Explain 5 + 9"]


def test_teacher_prompts_say_what_is_missing() -> None:
    with pytest.raises(TaskError, match=r"num_prompts is 5, but the task has 4 training examples"):
        teacher_prompts(TASK, spec_with(num_prompts=5))
    with pytest.raises(TaskError, match=r"task\.rationales\.prompt.*asks for `summ`.*Did you mean `sum`"):
        teacher_prompts(TASK, spec_with(prompt="{summ}"))


def test_write_rationales_writes_one_text_for_each_prompt() -> None:
    teacher, tokenizer = tiny_model("llama", dtype=torch.float32), tiny_tokenizer()
    prompts = teacher_prompts(TASK, SPEC)
    greedy = write_rationales(teacher, tokenizer, prompts, dataclasses.replace(WRITING, max_new_tokens=5), seed=0)
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.0, "batch_size": 64, "seed": 0}
    assert greedy == [row[0] for row in generate(teacher, tokenizer, prompts, **options)]
    sampling = dataclasses.replace(WRITING, max_new_tokens=5, temperature=1.0)
    draws = [write_rationales(teacher, tokenizer, prompts, sampling, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_with_prefix_changes_held_out_prompts_alone() -> None:
    task = with_prefix(TASK, "[label] ")
    assert [one.prompt for one in task.evaluation] == ["[label] 1 + 1 ="]
    assert task.train == TASK.train
    assert task.evaluation[0].answer == "2"


def test_put_before_needs_a_message_of_the_user() -> None:
    with pytest.raises(TaskError, match="no message of the user"):
        put_before("[label] ", [{"role": "system", "content": "Be brief."}])
