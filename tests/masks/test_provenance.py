"""Provenance from JSON: every field is checked."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from subnet_ft.masks import ModelRecord, Provenance
from subnet_ft.masks.provenance import incompleteness, narrowest_dtype, parse_provenance

WHOLE = Provenance(
    base=ModelRecord("base", "main", {"w": "bfloat16"}, {"w": "0123456789abcdef" * 2}),
    tuned=ModelRecord("tuned"),
    criterion="relative",
    tolerance=1e-5,
    compare_dtype="bfloat16",
    source={"kind": "union", "of": [{"kind": "extract"}, None]},
    density_by_tolerance={"0": 1.0, "1e-05": 0.0},
)


def test_parse_provenance_returns_what_was_written() -> None:
    assert parse_provenance(json.loads(json.dumps(asdict(WHOLE)))) == WHOLE
    assert parse_provenance(json.loads(json.dumps(asdict(Provenance())))) == Provenance()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nonsense": 1}, "`provenance` has the unknown field `nonsense`"),
        ({"criterion": "close"}, "`criterion` is 'close', expected one of exact, absolute, relative, or null"),
        ({"criterion": ["exact"]}, "`criterion` is ['exact']"),
        ({"tolerance": "0"}, "`tolerance` is '0', expected a number >= 0, or null"),
        ({"tolerance": True}, "`tolerance` is True"),
        ({"tolerance": -1.0}, "`tolerance` is -1.0"),
        ({"tolerance": math.nan}, "`tolerance` is nan"),
        ({"compare_dtype": "Tensor"}, "`compare_dtype` is 'Tensor', expected one of bfloat16, float16, float32"),
        ({"compare_dtype": {}}, "`compare_dtype` is {}"),
        ({"density_by_tolerance": [0.1]}, "`density_by_tolerance` is [0.1], expected an object"),
        ({"density_by_tolerance": {"0": 1.5}}, "expected a number from 0 to 1"),
        ({"density_by_tolerance": {"0": "1"}}, "`density_by_tolerance['0']` is '1'"),
        ({"density_by_tolerance": {"low": 0.5}}, "`a key of density_by_tolerance` is 'low'"),
        ({"density_by_tolerance": {"nan": 0.5}}, "`a key of density_by_tolerance` is 'nan'"),
        ({"source": "extract"}, "`source` is 'extract', expected an object"),
        ({"base": "model"}, "`base` is 'model', expected an object"),
        ({"base": {}}, "`base.name` is None, expected a string"),
        ({"base": {"name": 3}}, "`base.name` is 3"),
        ({"base": {"name": "a", "sha": "b"}}, "`base` has the unknown field `sha`"),
        ({"tuned": {"name": "a", "revision": 1}}, "`tuned.revision` is 1, expected a string or null"),
        ({"tuned": {"name": "a", "dtypes": {"w": None}}}, "`tuned.dtypes['w']` is None, expected a string"),
        ({"base": {"name": "a", "fingerprints": ["ab"]}}, "`base.fingerprints` is ['ab'], expected an object"),
        ({"base": {"name": "a", "fingerprints": {"w": "AB" * 16}}}, "expected 32 hexadecimal digits"),
        ({"base": {"name": "a", "fingerprints": {"w": "ab" * 16 + "\n"}}}, "expected 32 hexadecimal digits"),
        ({"base": {"name": "a", "fingerprints": {"w": 7}}}, "`base.fingerprints['w']` is 7"),
    ],
)
def test_parse_provenance_names_the_field_that_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="`") as caught:
        parse_provenance({**asdict(WHOLE), **change})
    assert message in str(caught.value)


def test_parse_provenance_does_not_repeat_a_long_value() -> None:
    with pytest.raises(ValueError, match="`criterion` is 'x") as caught:
        parse_provenance({"criterion": "x" * 10_000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("record", "lack"),
    [
        (ModelRecord("m", None, {"a": "float32", "b": "float32"}, {"a": "0" * 32, "b": "0" * 32}), None),
        (ModelRecord("m"), "base `m` has no fingerprint of `a`"),
        (ModelRecord("m", None, {}, {"a": "0" * 32, "b": "0" * 32}), "base `m` has no dtype of `a`"),
        (
            ModelRecord("m", None, {"a": "float32", "b": "float32"}, {"a": "0" * 32}),
            "base `m` has no fingerprint of `b`",
        ),
        (
            ModelRecord("m", None, {"a": "x", "b": "x", "c": "x"}, {"a": "0" * 32, "b": "0" * 32}),
            "base `m` has a dtype of `c`, which is not in the mask",
        ),
    ],
)
def test_incompleteness_wants_every_tensor_and_no_other(record: ModelRecord, lack: str | None) -> None:
    assert incompleteness(record, ["a", "b"]) == lack


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32, torch.bfloat16], "bfloat16"),
        ([torch.float16, torch.float32], "float16"),
        ([torch.bfloat16, torch.float16], "bfloat16"),
        ([torch.float16, torch.bfloat16], "float16"),
        ([torch.float64, torch.float32], "float32"),
        ([torch.float64, torch.int8], "float32"),
    ],
)
def test_narrowest_dtype_takes_the_first_of_the_narrowest(dtypes: list[torch.dtype], expected: str) -> None:
    assert narrowest_dtype(dtypes) == expected
