"""Turns a YAML tree into the dataclasses of `schema.py`, and reports every problem instead of the first."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Union

from subnet_ft.recipe.ranges import Range

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a map of keys to values",
    type(None): "null",
}


class _Invalid(Exception):
    """A value does not fit its annotation; the argument ends a sentence that starts with the key."""


def show(value: object) -> str:
    """Write a value as a user would have written it in YAML, shortened to one line."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return ``; did you mean `X`?`` for a close match, else the known words when they are few, else nothing."""
    names = list(known)
    close = difflib.get_close_matches(str(word), names, n=1)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 16 else ""


class Parser:
    """Collects problems while it builds dataclasses.

    `problems` holds one sentence per problem, each starting with the dotted key. `bad` holds the dotted keys without a
    usable value, so that no rule draws conclusions from them.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.bad: set[str] = set()

    def report(self, key: str, message: str) -> None:
        """Add a problem and mark `key` as unusable."""
        self.problems.append(f"{key}: {message}")
        self.bad.add(key)

    def is_usable(self, *keys: str) -> bool:
        """Whether nothing at, above or below the dotted `keys` was bad."""
        return all(
            self.has(key) and not any(bad.startswith((f"{key}.", f"{key}[")) for bad in self.bad) for key in keys
        )

    def has(self, key: str) -> bool:
        """Whether nothing at or above the dotted `key` was bad, so that it holds an object."""
        return not any(key == bad or key.startswith(f"{bad}.") for bad in self.bad)

    def parse(self, spec: type, tree: Any, prefix: str = "") -> Any:
        """Build the dataclass `spec` from a mapping; unusable fields get their default and are listed in `bad`.

        Args:
            spec: A dataclass of `schema.py`.
            tree: What YAML gave for it.
            prefix: The dotted key of `tree`, empty for the recipe itself.
        """
        if not isinstance(tree, Mapping):
            self.report(prefix or "recipe", f"must be {_WORDS[dict]}, got {show(tree)}")
            return None
        annotations = typing.get_type_hints(spec, include_extras=True)
        known = {item.name: item for item in fields(spec)}
        for key in tree:
            if key not in known:
                self._report_unknown(prefix, key, [name for name in known if name not in tree] or list(known), known)
        values = {name: self._field(item, annotations[name], tree, _join(prefix, name)) for name, item in known.items()}
        return spec(**values)

    def check(self, key: str, value: Any, expected: Any) -> Any:
        """Return `value` as the annotation `expected` wants it, or report and return `None`."""
        spec = _spec_in(expected)
        if spec is not None and (value is not None or spec is expected):
            return self.parse(spec, value, key)
        if typing.get_origin(expected) is list and isinstance(value, list):
            (element,) = typing.get_args(expected)
            return [self.check(f"{key}[{index}]", item, element) for index, item in enumerate(value)]
        if typing.get_origin(expected) is dict and isinstance(value, dict):
            element = typing.get_args(expected)[1]
            return {name: self.check(f"{key}.{name}", item, element) for name, item in value.items()}
        try:
            return _convert(value, expected)
        except _Invalid as invalid:
            self.report(key, str(invalid))
            return None

    def _field(self, item: Field[Any], expected: Any, tree: Mapping[str, Any], key: str) -> Any:
        if item.name in tree:
            return self.check(key, tree[item.name], expected)
        if item.default is not MISSING:
            return item.default
        if item.default_factory is not MISSING:
            return item.default_factory()
        if key not in self.bad:
            self.report(key, "missing, and required")
        return None

    def _report_unknown(self, prefix: str, key: object, candidates: list[str], known: Iterable[str]) -> None:
        hint = did_you_mean(key, candidates)
        close = "did you mean" in hint
        self.problems.append(f"{_join(prefix, str(key))}: unknown key{hint if close else did_you_mean(key, known)}")
        if close:
            self.bad.add(_join(prefix, hint.split("`")[1]))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _spec_in(expected: Any) -> type | None:
    """Return the dataclass that `expected` is, or that `expected` is an optional of."""
    options = typing.get_args(expected) if _is_union(expected) else (expected,)
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def _is_union(expected: Any) -> bool:
    return typing.get_origin(expected) in (Union, types.UnionType)


def _convert(value: Any, expected: Any) -> Any:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin is Annotated:
        number = _convert(value, arguments[0])
        for extra in arguments[1:]:
            if isinstance(extra, Range) and number not in extra:
                _refuse(value, str(extra))
        return number
    if origin is Literal:
        return _one_of(value, arguments)
    if _is_union(expected):
        return _convert_union(value, arguments)
    if isinstance(expected, type) and issubclass(expected, Enum):
        return _one_of(value, [member.value for member in expected])
    if expected is None or expected is type(None):
        return value if value is None else _refuse(value, "null")
    container = origin or expected
    if container is list:
        return value if isinstance(value, list) else _refuse(value, _WORDS[list])
    if container is dict:
        return value if isinstance(value, dict) else _refuse(value, _WORDS[dict])
    if container in (bool, int, float, str):
        return _scalar(value, container)
    return value


def _scalar(value: Any, expected: type) -> Any:
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        _refuse(value, _WORDS[expected])
    return value


def _one_of(value: Any, words: Iterable[Any]) -> Any:
    words = list(words)
    if isinstance(value, str) and value in words:
        return value
    close = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
    hint = f"; did you mean `{close[0]}`?" if close else ""
    raise _Invalid(f"must be one of {', '.join(words)}, got {show(value)}{hint}")


def _convert_union(value: Any, options: tuple[Any, ...]) -> Any:
    # An enum beside `str` (as in TRL's configs) names the allowed words; the plain `str` would allow any.
    enums = [option for option in options if isinstance(option, type) and issubclass(option, Enum)]
    if enums and isinstance(value, str):
        return _one_of(value, [member.value for option in enums for member in option])
    if isinstance(value, int) and not isinstance(value, bool) and int in options:
        return value
    messages = []
    for option in options:
        try:
            return _convert(value, option)
        except _Invalid as invalid:
            messages.append(str(invalid))
    if len([option for option in options if option is not type(None)]) == 1:
        raise _Invalid(next(text for text in messages if not text.startswith("must be null")))
    words = [_describe(option) for option in options]
    return _refuse(value, " or ".join(words))


def _describe(expected: Any) -> str:
    return _WORDS.get(typing.get_origin(expected) or expected, str(expected))


def _refuse(value: Any, expected: str) -> Any:
    raise _Invalid(f"must be {expected}, got {show(value)}")
