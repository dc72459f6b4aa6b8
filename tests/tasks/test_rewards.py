"""Rewards keep TRL's signature, find their example by index, and name what cannot be loaded."""

from __future__ import annotations

import asyncio
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest

from subnet_ft.errors import TaskError
from subnet_ft.recipe import TaskSpec
from subnet_ft.tasks import Example, Task, prompt_dataset, reward_functions

USER_MODULE = """
    import collections

    LIMIT = 3

    def length(completions, answer, level, prompts, **kwargs):
        return [len(c) + 10 * float(a) + 100 * l for c, a, l in zip(completions, answer, level)]

    async def later(completions, example, **kwargs):
        return [float(i) for i in example]

    def strict(prompts, completions):
        return []
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rewards_of_a_user.py").write_text(textwrap.dedent(USER_MODULE), encoding="utf-8")
    (tmp_path / "broken_rewards_of_a_user.py").write_text("import not_there_at_all", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "my_rewards_of_a_user"


def _half_if_longer(example: Example, answer: str) -> float:
    return 1.0 if answer == example.answer else 0.5 if answer.startswith(example.answer) else 0.0


TASK = Task(
    "t",
    [Example(f"{i} =", str(i), {"level": i, **({"odd": 1} if i % 2 else {})}) for i in range(4)],
    [],
    _half_if_longer,
)


def _rewards(*names: str) -> list[Any]:
    return reward_functions(TASK, TaskSpec(name="dataset", rewards=list(names)))


def _call(reward: Any, completions: list[Any], example: list[int]) -> Any:
    """Call a reward as GRPOTrainer._calculate_rewards does."""
    return reward(
        prompts=["p"] * len(completions),
        completions=completions,
        completion_ids=[[0]] * len(completions),
        example=example,
        trainer_state=None,
        log_extra=print,
        log_metric=print,
    )


def test_reward_functions_score_strings_and_messages() -> None:
    correct, score = _rewards("correct", "score")
    completions = [" 3 ", [{"role": "assistant", "content": "2!"}], "x", [{"role": "assistant", "content": None}]]
    assert _call(correct, completions, [3, 2, 1, 0]) == [1.0, 0.0, 0.0, 0.0]
    assert _call(score, completions, [3, 2, 1, 0]) == [1.0, 0.5, 0.0, 0.0]
    assert [reward.__name__ for reward in (correct, score)] == ["correct", "score"]


def test_reward_functions_refuse_a_batch_of_two_lengths() -> None:
    with pytest.raises(ValueError, match="zip"):
        _call(_rewards("correct")[0], ["1", "2"], [1])


def test_reward_functions_give_a_users_function_answers_and_shared_fields(user_module: str) -> None:
    (reward,) = _rewards(f"{user_module}:length")
    assert reward.__name__ == "length"
    assert _call(reward, ["a", "bb"], [3, 2]) == [1 + 30 + 300, 2 + 20 + 200]


def test_reward_functions_keep_async_functions_async(user_module: str) -> None:
    (reward,) = _rewards(f"{user_module}:later")
    assert inspect.iscoroutinefunction(reward)
    assert asyncio.run(_call(reward, ["a", "b"], [3, 1])) == [3.0, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("corect", r"`corect` is not a reward\. Did you mean `correct`\?"),
        ("a.b:", "is not a reward"),
        (
            "not_there_at_all:f",
            r"cannot be imported \(ModuleNotFoundError: No module named 'not_there_at_all'\).*PYTHONPATH",
        ),
        ("broken_rewards_of_a_user:f", "No module named 'not_there_at_all'"),
        (
            "my_rewards_of_a_user:lenght",
            r"has no `lenght`\. Did you mean `length`\? Its functions are: length, later, strict\.",
        ),
        ("my_rewards_of_a_user:LIMIT", "has no function, but a int, `LIMIT`"),
        ("my_rewards_of_a_user:strict", r"must take keyword arguments and `\*\*kwargs`"),
    ],
)
def test_reward_functions_explain_what_is_wrong(user_module: str, name: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        _rewards(name)


def test_prompt_dataset_numbers_the_training_examples() -> None:
    assert prompt_dataset(TASK).to_list() == [{"prompt": f"{i} =", "example": i} for i in range(4)]
