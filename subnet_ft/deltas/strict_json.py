"""JSON of a stranger: strict, bounded, and quoted in messages no longer than a line."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

from subnet_ft.errors import DeltaFileError

MAX_NAME = 1 << 10
"""Characters of the longest name in an object."""


def json_object(path: Path, text: str | bytes, what: str) -> dict[str, Any]:
    """Read an object: UTF-8, from its first byte on, with no name twice and no number that JSON does not have.

    Args:
        path: The file that it comes from, for messages.
        text: The object, and nothing else but white space behind it.
        what: What messages call it.

    Raises:
        DeltaFileError: It is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found or len(name) > MAX_NAME:
                raise ValueError(
                    f"it has {name[:80]!r} twice" if name in found else f"a name has {len(name):,} letters"
                )
            found[name] = value
        return found

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):  # also NaN and Infinity, which are no JSON
            raise ValueError(f"it has the number {number[:80]}")
        return float(number)

    try:
        if isinstance(text, bytes):  # which `json` would also read as UTF-16, and with a mark in front
            text = text.decode()
            if not text.startswith("{"):
                raise ValueError("it does not start with {")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise DeltaFileError(f"`{path}`: its {what} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise DeltaFileError(f"`{path}`: its {what} is {type(value).__name__}, expected an object.")
    return value


def shown(value: Any) -> str:
    """Return a value as messages quote it, however long or deep it is."""
    return reprlib.repr(value)


def is_deeper(value: Any, limit: int) -> bool:
    """Tell whether an object or array holds others more than `limit` deep, itself counted."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
    return bool(level)
