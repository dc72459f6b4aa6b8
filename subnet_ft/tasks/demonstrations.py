"""Demonstrations: prompts with completions to copy, made from a task's reference answers or a dataset's completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from subnet_ft.errors import TaskError
from subnet_ft.tasks.procedural import PREFIX, template_fields
from subnet_ft.tasks.prompts import render_template
from subnet_ft.tasks.task import Example, Task

if TYPE_CHECKING:
    from datasets import Dataset

    from subnet_ft.recipe import TaskSpec


def demonstration_dataset(task: Task, spec: TaskSpec) -> Dataset:
    """Return the training prompts with what to write after them: columns `prompt`, `completion`.

    The completion is the template `task.completion`, else the column `completion` of a dataset, else the reference
    answer; for chat prompts it is one message of the assistant.

    Raises:
        TaskError: A template that cannot be filled, or an example without a completion.
    """
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": example.prompt, "completion": _completion(example, spec)} for example in task.train]
    )


def _completion(example: Example, spec: TaskSpec) -> Any:
    fields = template_fields(example.fields) if spec.name.startswith(PREFIX) else example.fields
    given = fields.get("completion", example.answer)
    if spec.completion is None and isinstance(given, list):
        return given
    template = "{completion}" if spec.completion is None else spec.completion
    text = render_template(template, {"completion": given, **fields}, key="task.completion")
    if not text.strip():
        raise TaskError(
            f"`{spec.name}` has nothing to write after {example.prompt!r:.200}: its reference answer is empty. Set "
            "task.completion to a template over the fields of an example."
        )
    return text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]
