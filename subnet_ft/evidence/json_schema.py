"""JSON schemas of evidence, made from the dataclasses that hold it: types from annotations, texts from docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from typing import Any

_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def json_schema(kind: type, *, identifier: str) -> dict[str, Any]:
    """Return the JSON schema, draft 2020-12, of what `dataclasses.asdict` makes of a dataclass.

    Every field is required and no other is allowed, so that a reader knows what to expect of one version.

    Args:
        kind: A dataclass whose fields are dataclasses, lists, tuples, mappings with text keys, or JSON's own values.
        identifier: The schema's URI.

    Raises:
        TypeError: A field has another type, or two dataclasses share a name.
    """
    definitions: dict[str, Any] = {}
    owners: dict[str, type] = {}
    top = _dataclass(kind, definitions, owners)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": identifier,
        "title": kind.__name__,
        **top,
        "$defs": dict(sorted(definitions.items())),
    }


def _dataclass(kind: type, definitions: dict[str, Any], owners: dict[str, type]) -> dict[str, Any]:
    annotations = typing.get_type_hints(kind)
    texts = _field_texts(kind)
    properties = {}
    for field in dataclasses.fields(kind):
        found = _schema(annotations[field.name], definitions, owners, f"{kind.__name__}.{field.name}")
        properties[field.name] = {**found, **({"description": texts[field.name]} if field.name in texts else {})}
    return {
        "description": " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split()),
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _schema(kind: Any, definitions: dict[str, Any], owners: dict[str, type], where: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return {}
    if kind in _JSON_TYPES:
        return {"type": _JSON_TYPES[kind]}
    if origin is typing.Literal:
        return {"const": arguments[0]} if len(arguments) == 1 else {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        options = [_schema(option, definitions, owners, where) for option in arguments]
        names = [option["type"] for option in options if set(option) == {"type"}]
        return {"type": names} if len(names) == len(options) else {"anyOf": options}
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return {"type": "array", "items": _schema(arguments[0], definitions, owners, where)}
    if origin is tuple:
        items = [_schema(one, definitions, owners, where) for one in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict and arguments[0] is str:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions, owners, where)}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if owners.setdefault(kind.__name__, kind) is not kind:
            raise TypeError(f"`{where}`: two dataclasses are named `{kind.__name__}`; rename one.")
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # a dataclass may hold its own kind
            definitions[kind.__name__] = _dataclass(kind, definitions, owners)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    raise TypeError(f"`{where}` has the type {kind!r}, which has no JSON schema here.")


def _field_texts(kind: type) -> dict[str, str]:
    """Return the string below every field, as one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            texts[field.target.id] = " ".join(below.value.value.split())
    return texts
