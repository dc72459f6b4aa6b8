"""reasoning-gym tasks: prompts, scores, disjoint sets, and messages that name the next step."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from subnet_ft.errors import TaskError
from subnet_ft.recipe import TaskSpec
from subnet_ft.tasks import Task, load_task

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "5 + 9 = 14\n8 - 3 = 5\n{expression} ="
PARAMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def chain_sum(**overrides: Any) -> TaskSpec:
    fields: dict[str, Any] = {
        "name": "reasoning_gym/chain_sum",
        "params": PARAMS,
        "num_train": 60,
        "num_eval": 20,
        "prompt": TEMPLATE,
        "answer_pattern": r"^\s*(-?\d+)",
    }
    return TaskSpec(**{**fields, **overrides})


def _prompts(task: Task) -> list[str]:
    return [str(example.prompt) for example in [*task.evaluation, *task.train]]


def test_load_task_fills_the_template_and_scores_by_the_datasets_own_rule() -> None:
    task = load_task(chain_sum(), seed=0)
    for example in task.train:
        match = re.fullmatch(r"5 \+ 9 = 14\n8 - 3 = 5\n(\d+) ([+-]) (\d+) =", str(example.prompt))
        assert match is not None
        left, right = int(match[1]), int(match[3])
        answer = left + right if match[2] == "+" else left - right
        assert example.answer == str(answer)
        assert task.score(example, f" {answer}\n71 - 26 = 45") == 1.0
        assert not task.is_correct(example, f" {answer + 1}")
        assert not task.is_correct(example, f"The answer is {answer}")
        assert not task.is_correct(example, "")


def test_load_task_without_a_pattern_takes_the_whole_text_and_gives_partial_scores() -> None:
    task = load_task(chain_sum(answer_pattern=None), seed=0)
    example = next(example for example in task.train if len(example.answer) == 2)
    assert task.is_correct(example, f" {example.answer} ")
    assert task.score(example, f"it is {example.answer}") == pytest.approx(2 / 8)


def test_load_task_draws_disjoint_unique_sets_of_the_sizes_asked_for() -> None:
    task = load_task(chain_sum(num_train=300, num_eval=100), seed=0)
    assert (len(task.train), len(task.evaluation)) == (300, 100)
    assert len(set(_prompts(task))) == 400


def test_load_task_splits_easy_prompts_evenly() -> None:
    """One-digit prompts run out first; both sets still hold the same share of them."""
    task = load_task(chain_sum(num_train=600, num_eval=600), seed=0)

    def count_one_digit(examples: list[Any]) -> int:
        return sum(example.fields["metadata"]["num_digits"] == 1 for example in examples)

    counts = count_one_digit(task.train), count_one_digit(task.evaluation)
    assert sum(counts) > 150
    assert abs(counts[0] - counts[1]) < 60


def test_load_task_is_decided_by_the_seed_in_every_process() -> None:
    program = (
        "import hashlib\nfrom subnet_ft.recipe import TaskSpec\nfrom subnet_ft.tasks import load_task\n"
        f"task = load_task({chain_sum()!r}, seed=3)\n"
        "print(hashlib.sha256(repr((task.train, task.evaluation)).encode()).hexdigest())"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "12345",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    task = load_task(chain_sum(), seed=3)
    assert done.stdout.strip() == hashlib.sha256(repr((task.train, task.evaluation)).encode()).hexdigest()


def test_load_task_shares_next_to_nothing_between_neighbouring_seeds() -> None:
    """Entry i + 1 of reasoning-gym's seed s is entry i of seed s + 1; the seeds of recipes must not do that."""
    spec = chain_sum(params={**PARAMS, "min_digits": 4, "max_digits": 4})
    assert not set(_prompts(load_task(spec, seed=0))) & set(_prompts(load_task(spec, seed=1)))


def test_load_task_wraps_prompts_as_chat_messages() -> None:
    plain = load_task(chain_sum(num_train=2, num_eval=1, prompt=None), seed=0)
    chat = load_task(chain_sum(num_train=2, num_eval=1, prompt=None, chat=True, system_prompt="Be brief."), seed=0)
    assert str(plain.train[0].prompt).startswith("State the final answer")
    assert chat.train[0].prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": plain.train[0].prompt},
    ]


def test_load_task_counts_what_is_missing_when_prompts_run_out() -> None:
    spec = chain_sum(params={**PARAMS, "max_digits": 1}, num_train=300, num_eval=0)
    with pytest.raises(TaskError, match=r"only 200 different prompts in \d+ draws, but .* = 0 \+ 300 = 300 are asked"):
        load_task(spec, seed=0)
    assert len(load_task(chain_sum(params={**PARAMS, "max_digits": 1}, num_train=200, num_eval=0), seed=0).train) == 200


def test_load_task_gives_none_when_none_are_asked_for() -> None:
    task = load_task(chain_sum(num_train=0, num_eval=3), seed=0)
    assert (len(task.train), len(task.evaluation)) == (0, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"name": "reasoning_gym/chain_sun"}, r"no dataset `chain_sun`\. Did you mean `chain_sum`\?"),
        ({"name": "chain_sum"}, r"`chain_sum` is not a task\. Write `reasoning_gym/NAME`"),
        ({"name": "datasets"}, r"Did you mean `dataset`\?"),
        (
            {"params": {"min_term": 2}},
            r"no `min_term`\. Did you mean `min_terms`\? It takes allow_negation, max_digits",
        ),
        ({"params": {"min_terms": 9}}, "max_terms must be >= min_terms.*Correct the values"),
        ({"params": {"min_terms": "two"}}, r"refuses task\.params \{'min_terms': 'two'\}"),
        ({"params": {"seed": 1}}, r"sets seed\. Leave them out"),
        ({"prompt": "{expresion} ="}, r"asks for `expresion`, .* Did you mean `expression`\?"),
        ({"prompt": "\\boxed{} {expression}"}, r"cannot be filled: .* Write a field as \{name\} and .* \{\{ or \}\}\."),
        ({"prompt": "{expression"}, "cannot be filled"),
        ({"system_prompt": "Be brief."}, r"Set task\.chat to true"),
        ({"answer_pattern": r"\d"}, "0 groups"),
    ],
)
def test_load_task_explains_what_is_wrong(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_task(chain_sum(**overrides), seed=0)


@pytest.mark.parametrize("name", ["word_ladder", "prime_factorization", "graph_color", "list_functions"])
def test_load_task_accepts_unusual_datasets(name: str) -> None:
    """One that ends early, one whose verifier raises, one without a single reference, one with prepared entries."""
    task = load_task(TaskSpec(name=f"reasoning_gym/{name}", num_train=6, num_eval=2), seed=0)
    assert (len(task.train), len(task.evaluation)) == (6, 2)
    assert all(isinstance(example.answer, str) for example in task.train)
    assert not task.is_correct(task.train[0], "garbage 12")
    if name != "graph_color":
        assert task.is_correct(task.train[0], task.train[0].answer)
