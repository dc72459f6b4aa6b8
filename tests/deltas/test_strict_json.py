"""JSON of a stranger: what is refused, and that no message is longer than a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from subnet_ft.deltas.strict_json import MAX_NAME, is_deeper, json_object, shown
from subnet_ft.errors import DeltaFileError

PATH = Path("some.delta.safetensors")


def nested(depth: int) -> str:
    return '{"a":' + "[" * (depth - 1) + "]" * (depth - 1) + "}" if depth > 1 else "{}"


def test_json_object_reads_texts_and_bytes() -> None:
    text = '{"a":[1,-2,0.5,true,null,"\\ud800"],"é":{}}  '
    found = {"a": [1, -2, 0.5, True, None, "\ud800"], "é": {}}
    assert json_object(PATH, text, "header") == found == json_object(PATH, text.encode(), "header")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "is list, expected an object"),
        ("{} x", "not valid JSON"),
        ('{"a":1,"a":1}', "has 'a' twice"),
        ('{"a":{"b":1,"b":1}}', "has 'b' twice"),
        ('{"' + "x" * (MAX_NAME + 1) + '":1}', "a name has 1,025 letters"),
        ('{"a":NaN}', "the number NaN"),
        ('{"a":-Infinity}', "the number -Infinity"),
        ('{"a":1e999}', "the number 1e999"),
        ('{"a":' + "9" * 5000 + "}", "not valid JSON"),
        (nested(100_000), "not valid JSON"),
        ('{"a":1}'.encode("utf-8-sig"), "does not start with"),
        ('{"a":1}'.encode("utf-16"), "not valid JSON"),
        (b' {"a":1}', "does not start with"),
        (b'{"\xed\xa0\x80":1}', "not valid JSON"),
        (b'{"\xff":1}', "not valid JSON"),
    ],
)
def test_json_object_refuses(text: str | bytes, message: str) -> None:
    with pytest.raises(DeltaFileError, match=message) as refused:
        json_object(PATH, text, "header")
    assert len(str(refused.value)) < 400


def test_shown_is_short_and_reaches_no_depth() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, "x" * 10**6, [1] * 10**6, {str(n): n for n in range(10**4)}, 10**4000):
        assert len(shown(value)) < 300
    while deep:  # or taking it apart would itself go that deep
        deep = deep[0]
    assert shown([2, 5]) == "[2, 5]"
    assert shown("x") == "'x'"


def test_is_deeper_counts_the_outermost() -> None:
    for depth in (1, 2, 5, 32):
        value = json_object(PATH, nested(depth), "header")
        assert not is_deeper(value, depth)
        assert is_deeper(value, depth - 1)
