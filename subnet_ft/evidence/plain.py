"""Evidence as JSON values and back: dataclasses of dataclasses, lists and mappings."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def from_plain(kind: type[T], value: Any) -> T:
    """Build the dataclass `kind` from what `dataclasses.asdict` made of one, and JSON of that.

    Args:
        kind: A dataclass whose fields are dataclasses, lists, tuples, mappings with text keys, or JSON's own values.
        value: As read from JSON; a field that it lacks gets its default.

    Raises:
        TypeError: `value` has a field that `kind` has not, or lacks one without a default.
    """
    built: T = _build(kind, value)
    return built


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that JSON can hold: what it has no form for becomes its string, NaN and infinity null."""
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    return plain


def _build(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (option for option in arguments if option is not type(None))
        return _build(kind, value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        annotations = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(annotations))
        if unknown:
            raise TypeError(f"`{kind.__name__}` has no field `{unknown[0]}`.")
        return kind(**{name: _build(annotations[name], entry) for name, entry in value.items()})
    if origin is tuple:
        inner = arguments[0] if arguments[1:] == (...,) else None
        kinds = [inner] * len(value) if inner is not None else arguments
        return tuple(_build(one, entry) for one, entry in zip(kinds, value, strict=True))
    if origin is list:
        return [_build(arguments[0], entry) for entry in value]
    if origin in (dict, Mapping):
        return {key: _build(arguments[1], entry) for key, entry in value.items()}
    return value
