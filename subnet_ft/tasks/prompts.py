"""Turn the fields of an example into a prompt."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from subnet_ft.errors import TaskError

if TYPE_CHECKING:
    from subnet_ft.recipe import TaskSpec
    from subnet_ft.tasks.task import Prompt


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean ...?` for the closest of `known`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean `{close[0]}`?" if close else ""


def render_template(template: str, fields: Mapping[str, Any], *, key: str) -> str:
    """Fill a format template such as `5 + 9 = 14\\n{expression} =`.

    Args:
        template: Named fields in braces; a literal brace is doubled.
        fields: Values by name.
        key: The recipe key that holds the template, for messages.

    Raises:
        TaskError: A field that does not exist or is `None`, or a template that cannot be formatted.
    """
    try:
        return template.format_map({name: value for name, value in fields.items() if value is not None})
    except KeyError as error:
        name = str(error.args[0])
        if name in fields:
            raise TaskError(f"{key} asks for `{name}`, which is empty here. Remove the example or fill it.") from error
        raise TaskError(
            f"{key} asks for `{name}`, but an example has {', '.join(map(str, fields))}.{did_you_mean(name, fields)} "
            "Use one of these, and write a literal brace as {{ or }}."
        ) from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise TaskError(
            f"{key} {template!r} cannot be filled: {error}. "
            "Write a field as {name} and a literal brace as {{ or }}."
        ) from error


def build_prompt(spec: TaskSpec, fields: Mapping[str, Any], *, default: str, where: str) -> Prompt:
    """Build the prompt of one example: its template, or the field `default`, as text or as chat messages.

    `where` names the example in messages. A field that already holds a list of messages is used as it is, after the
    system message if there is one.

    Raises:
        TaskError: A missing field, a value that is neither text nor messages, or `system_prompt` without `chat`.
    """
    system = [] if spec.system_prompt is None else [{"role": "system", "content": spec.system_prompt}]
    if spec.prompt is None and isinstance(fields.get(default), list):
        return [*system, *fields[default]]
    template = "{" + default + "}" if spec.prompt is None else spec.prompt
    text = render_template(template, fields, key=f"{where}: task.prompt")
    if spec.chat:
        return [*system, {"role": "user", "content": text}]
    if system:
        raise TaskError(
            f"{where}: task.system_prompt needs chat messages. Set task.chat to true, or put the text in task.prompt."
        )
    return text


def prompt_key(prompt: Prompt) -> str:
    """Return what makes a prompt the same as another one."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
