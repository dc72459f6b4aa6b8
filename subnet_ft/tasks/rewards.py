"""Reward functions in TRL's form, made from a task's verifier or imported from a user's module."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from subnet_ft.errors import TaskError
from subnet_ft.tasks.prompts import did_you_mean
from subnet_ft.tasks.task import Task

if TYPE_CHECKING:
    from subnet_ft.recipe import TaskSpec

RewardFunction = Callable[..., Any]
"""`f(prompts, completions, **columns) -> list[float]`, one reward per completion; may be `async`."""

_BUILT_IN = ("correct", "score")


def reward_functions(task: Task, spec: TaskSpec) -> list[RewardFunction]:
    """Return the rewards of `spec.rewards`, in order, for a trainer fed by `prompt_dataset(task)`.

    `correct` gives 1 for the full score and 0 otherwise; `score` gives the verifier's score. A user's function gets,
    beside what TRL passes, one column for each thing known about the examples: `answer`, and the keys of
    `Example.fields`.
    `__name__` is the name under which TRL logs a reward.

    Raises:
        TaskError: A name that is neither built in nor importable, or a function that TRL could not call.
    """
    return [_built_in(task, name) if name in _BUILT_IN else _with_columns(task, _load(name)) for name in spec.rewards]


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """Return the text of a completion as TRL hands it over: a string, or messages, of which the last counts."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"] or "")


def _built_in(task: Task, name: str) -> RewardFunction:
    judge: Callable[..., float] = task.is_correct if name == "correct" else task.score

    def reward(prompts: list[Any], completions: list[Any], *, example: list[int], **columns: Any) -> list[float]:
        return [
            float(judge(task.train[index], completion_text(completion)))
            for index, completion in zip(example, completions, strict=True)
        ]

    reward.__name__ = reward.__qualname__ = name
    return reward


def _with_columns(task: Task, function: RewardFunction) -> RewardFunction:
    """Hand `function` the answers and fields of the examples as columns, as if the dataset had them."""

    def add_columns(columns: dict[str, Any]) -> dict[str, Any]:
        examples = [task.train[index] for index in columns["example"]]
        shared = set.intersection(*(set(example.fields) for example in examples)) if examples else set()
        known = {name: [example.fields[name] for example in examples] for name in sorted(shared)}
        return {**known, "answer": [example.answer for example in examples], **columns}

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def reward_async(**columns: Any) -> Any:
            return await function(**add_columns(columns))

        return reward_async

    @functools.wraps(function)
    def reward(**columns: Any) -> Any:
        return function(**add_columns(columns))

    return reward


def _load(name: str) -> RewardFunction:
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise TaskError(
            f"task.rewards: `{name}` is not a reward.{did_you_mean(name, _BUILT_IN)} "
            f"Write {' or '.join(f'`{known}`' for known in _BUILT_IN)}, or a function of yours as "
            "`package.module:function`."
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise TaskError(
            f"task.rewards: the module of `{name}` cannot be imported ({reason}). Install its package, or put its "
            "folder on the path with PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not inspect.isroutine(function):
        functions = [known for known, value in vars(module).items() if inspect.isfunction(value)]
        what = "has no" if function is None else "has no function, but a " + type(function).__name__ + ","
        raise TaskError(
            f"task.rewards: `{module_name}` {what} `{function_name}`.{did_you_mean(function_name, functions)} "
            f"Its functions are: {', '.join(functions) or 'none'}."
        )
    _check_signature(name, function)
    return function


def _check_signature(name: str, function: RewardFunction) -> None:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters) or not any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters
    ):
        raise TaskError(
            f"task.rewards: `{name}` must take keyword arguments and `**kwargs`, because trainers pass prompts, "
            "completions, completion_ids and more. Write "
            f"`def {name.partition(':')[2]}(completions, answer, **kwargs) -> list[float]`."
        )
