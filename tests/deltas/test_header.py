"""The header of a delta file: layout, and a reader that meets every lie with DeltaFileError and nothing else."""

from __future__ import annotations

import copy
import json
import math
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_checkpoints import random_case, record, rewrite, split, unchanged

from subnet_ft.deltas import Delta, DeltaFile, TensorDelta
from subnet_ft.deltas.header import (
    BITMAP,
    MAX_HEADER,
    Header,
    TensorEntry,
    parse_header,
    recorded_sha256,
    write_header,
)
from subnet_ft.errors import DeltaError, DeltaFileError

SUFFIX = ".delta.safetensors"
PATH = Path(f"some{SUFFIX}")

ANYTHING: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 7, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 1.5, 1e308, float("nan"),
    float("inf"), "", "x", "../../etc/passwd", "/etc/passwd", "\0", "\ud800", "bfloat16", "F32", "zstd",
    "mask:" + "0" * 64, "0" * 32, "0" * 64,
    [], [0], [-1], [2**63 - 1], [2**32, 2**31], [0, 2**63 - 1], [2**63 - 1, 0], [[]], {}, {"a": 1},
)  # fmt: skip
"""What stands in the place of every single value of a header, one after another."""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what makes files outlive a power cut: hundreds of them are written here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A delta of two tensors, both of which change, and a third one that does not."""
    base = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(9), "c": torch.zeros(2)}
    tuned = {name: weight.clone() for name, weight in base.items()}
    tuned["a"][1, 2], tuned["b"][:3] = 2.0, 3.0
    tensors = {
        "a": TensorDelta(torch.tensor([128, 0], dtype=torch.uint8), torch.full((1,), 2.0).bfloat16(), (3, 5)),
        "b": TensorDelta(torch.tensor([7, 0], dtype=torch.uint8), torch.full((3,), 3.0), (9,)),
        "c": TensorDelta(torch.empty(0, dtype=torch.uint8), torch.empty(0), (2,)),
    }
    return Delta(tensors, record(base), record(tuned).fingerprints, {"kind": "test"}).save(tmp_path / f"d{SUFFIX}")


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value of a tree of JSON, the root excepted."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        yield (*above, key)
        yield from places(child, (*above, key))


def replaced(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return tree


def opened(path: Path) -> bool:
    """Tell whether a file is read to its end; whatever is refused is refused by the error of damaged files."""
    try:
        Delta.load(path)
    except DeltaError:
        return False
    return True


def assert_all_refused_but(
    path: Path, variants: Iterator[tuple[tuple[Any, ...], Any, dict[str, Any]]], free: set[Any]
) -> None:
    """Open every variant of the header; those that open must differ in `free` places only, which say nothing."""
    _, payload = split(path)
    count = refused = 0
    for place, value, header in variants:
        rewrite(path, header, payload)
        count += 1
        with unchanged(path.parent):
            if opened(path):
                assert place[0] in free, (place, value)
            else:
                refused += 1
    assert refused > count // 2


def test_a_file_with_anything_else_in_the_place_of_one_outer_value_is_refused(path: Path) -> None:
    header, _ = split(path)
    ways = [way for way in places(header) if way[0] != "__metadata__"]
    assert len(ways) > 20
    variants = ((way, value, replaced(header, way, value)) for way in ways for value in ANYTHING)
    same = [(way, value, new) for way, value, new in variants if json.dumps(new) != json.dumps(header)]
    assert_all_refused_but(path, iter(same), set())


@pytest.mark.parametrize("field", ["encoding", "format", "version", "positions", "base", "source", "tensors"])
def test_a_file_with_anything_else_in_the_place_of_one_inner_value_is_refused(field: str, path: Path) -> None:
    header, _ = split(path)
    variants = [((field,), value, replaced(header, ("__metadata__", field), value)) for value in ANYTHING]
    if field in ("base", "source", "tensors"):
        inner = json.loads(header["__metadata__"][field])
        for way in places(inner):
            for value in ANYTHING:
                text = json.dumps(replaced(inner, way, value))
                if json.loads(text) != inner:
                    variants.append((way, value, replaced(header, ("__metadata__", field), text)))
    # A base's name is information; fingerprints, and what an unchanged tensor is, only weights contradict.
    free = {"base": {"name", "revision"}}.get(field, set())
    if field == "tensors":
        odd = {("a", "base"), ("a", "result"), ("b", "base"), ("b", "result"), ("c", "shape"), ("c", "dtype")}
        variants = [variant for variant in variants if variant[0][:2] not in odd or isinstance(variant[1], dict | bool)]
    if field == "source":
        for _, value, new in variants[len(ANYTHING) :]:
            rewrite(path, new, split(path)[1])
            assert opened(path) == (not isinstance(value, float) or math.isfinite(value))
        variants = variants[: len(ANYTHING)]
    assert_all_refused_but(path, iter(variants), free)


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "..", "", "a/b", "bits/a", "values/a", "\0", "\ud800", "\x1b[2J", "é" * 999],
)
def test_names_are_data_whatever_they_look_like(name: str, tmp_path: Path) -> None:
    base, tuned = {name: torch.zeros(8)}, {name: torch.ones(8)}
    bits = torch.full((1,), 255, dtype=torch.uint8)
    delta = Delta({name: TensorDelta(bits, torch.ones(8), (8,))}, record(base), record(tuned).fingerprints)
    path = delta.save(tmp_path / f"d{SUFFIX}")
    with unchanged(tmp_path):
        assert Delta.load(path).tensors.keys() == {name}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("which", ["tensors", "outer", "metadata", "base", "entry"])
def test_a_name_twice_is_refused_in_every_object(which: str, path: Path) -> None:
    header, payload = split(path)
    text = json.dumps(header, separators=(",", ":"))
    once, twice = {
        "tensors": ('{\\"a\\":', '{\\"c\\":{},\\"a\\":'),
        "outer": ('"values/a":', '"values/b":{},"values/a":'),
        "metadata": ('"format":', '"format":"x","format":'),
        "base": ('{\\"name\\":', '{\\"name\\":\\"x\\",\\"name\\":'),
        "entry": ('\\"count\\":1', '\\"count\\":0,\\"count\\":1'),
    }[which]
    assert text.count(once) == 1
    rewrite(path, text.replace(once, twice).encode(), payload)
    with unchanged(path.parent), pytest.raises(DeltaFileError, match="twice"):
        DeltaFile(path)


@pytest.mark.parametrize("depth", [33, 60, 900, 970, 980, 100_000])
def test_values_that_nest_are_refused_at_any_depth_and_in_a_short_message(depth: int, path: Path) -> None:
    header, payload = split(path)
    deep = "[" * depth + "]" * depth
    text = json.dumps(header, separators=(",", ":"))
    for once, nested in (
        ('"dtype":"BF16"', f'"dtype":{deep}'),
        ('"shape":[1]', f'"shape":{deep}'),
        ('"data_offsets":[0,12]', f'"data_offsets":{deep}'),
        ('\\"count\\":1', f'\\"count\\":{deep}'),
        ('\\"shape\\":[3,5]', f'\\"shape\\":{deep}'),
        ('\\"name\\":\\"a base\\"', f'\\"name\\":{deep}'),
        ('\\"kind\\":\\"test\\"', f'\\"kind\\":{deep}'),
    ):
        assert text.count(once) == 1, once
        rewrite(path, text.replace(once, nested).encode(), payload)
        with unchanged(path.parent), pytest.raises(DeltaFileError) as refused:
            DeltaFile(path)
        assert len(str(refused.value)) < 600


@pytest.mark.parametrize("field", ["format", "version", "encoding", "positions", "base"])
def test_long_values_are_refused_in_a_short_message(field: str, path: Path) -> None:
    header, payload = split(path)
    long = "x" * 10**6
    header["__metadata__"][field] = json.dumps({"name": long, "revision": None}) if field == "base" else long
    rewrite(path, header, payload)
    with pytest.raises(DeltaFileError) as refused:
        DeltaFile(path)
    assert len(str(refused.value)) < 600


def test_source_may_nest_as_deep_as_the_page_says(path: Path) -> None:
    header, payload = split(path)
    header["__metadata__"]["source"] = '{"a":' + "[" * 31 + "]" * 31 + "}"
    rewrite(path, header, payload)
    assert opened(path)


HEADER = Header({}, "base", None, {"kind": "test"}, BITMAP, "raw")
FINGERPRINT = "0" * 32


def parsed(tensors: dict[str, list[int]], size: int) -> None:
    """Parse a header whose tensors, 8 bytes each, lie at some offsets of a file with `size` bytes of values."""
    names = [f"{prefix}/{number}" for number in range(len(tensors) // 2) for prefix in ("values", "bits")]
    assert names == list(tensors)
    entries = {str(n): TensorEntry((64,), "float32", 2, FINGERPRINT, FINGERPRINT) for n in range(len(tensors) // 2)}
    start, _ = write_header(Header(entries, "base", None, {}, BITMAP, "raw"), {})
    table = json.loads(start[8:])
    for key, offsets in tensors.items():
        dtype, length = ("F32", 2) if key.startswith("values") else ("U8", 8)
        table[key] = {"dtype": dtype, "shape": [length], "data_offsets": offsets}
    text = json.dumps(table).encode()
    parse_header(PATH, text, 8 + len(text) + size)


def test_offsets_that_overlap_leave_gaps_or_leave_the_file_are_refused() -> None:
    parsed({"values/0": [0, 8], "bits/0": [8, 16]}, 16)
    parsed({"values/0": [8, 16], "bits/0": [0, 8]}, 16)
    for tensors, size, message in (
        ({"values/0": [0, 8], "bits/0": [0, 8]}, 8, "overlap"),
        ({"values/0": [0, 8], "bits/0": [4, 12]}, 12, "overlap"),
        ({"values/0": [0, 8], "bits/0": [7, 15]}, 16, "overlap"),
        ({"values/0": [0, 8], "bits/0": [9, 17]}, 17, "bytes belong to none"),
        ({"values/0": [1, 9], "bits/0": [9, 17]}, 17, "bytes belong to none"),
        ({"values/0": [0, 8], "bits/0": [8, 16]}, 15, "truncated"),
        ({"values/0": [0, 8], "bits/0": [8, 16]}, 17, "something was added"),
        ({"values/0": [2**63 - 8, 2**63], "bits/0": [0, 8]}, 16, "cannot lie at"),
        ({"values/0": [2**63 - 9, 2**63 - 1], "bits/0": [0, 8]}, 16, "starts at byte"),
        ({"values/0": [-8, 0], "bits/0": [0, 8]}, 8, "cannot lie at"),
    ):
        with pytest.raises(DeltaFileError, match=message):
            parsed(tensors, size)


def test_a_header_of_the_largest_size_is_read_in_bounded_memory(path: Path) -> None:
    header, payload = split(path)
    header["__metadata__"]["source"] = "{"
    room = MAX_HEADER - len(json.dumps(header, separators=(",", ":")))
    header["__metadata__"]["source"] = '{"a":[' + "[]," * (room // 3 - 20) + "0]"  # as many objects as it may hold
    rewrite(path, header, payload)
    assert 0.99 * MAX_HEADER < path.stat().st_size < MAX_HEADER
    tracemalloc.start()
    try:
        with pytest.raises(DeltaFileError, match="not valid JSON"):
            DeltaFile(path)
        assert tracemalloc.get_traced_memory()[1] < 40 * MAX_HEADER
    finally:
        tracemalloc.stop()


def test_write_header_is_aligned_and_says_where_the_digits_are() -> None:
    for seed in range(20):
        entries = random_case(seed)[2].entries
        start, at = write_header(Header(entries, "b" * seed, "r", {"kind": "test"}, BITMAP, "raw"), {"x": ("U8", 3, 3)})
        assert len(start) % 8 == 0
        assert int.from_bytes(start[:8], "little") == len(start) - 8
        assert start[at : at + 64] == b"0" * 64
        marked = start[:at] + b"ab" * 32 + start[at + 64 :]
        assert recorded_sha256(PATH, marked) == ("ab" * 32, start)


def test_recorded_sha256_refuses_digits_that_are_missing_or_stand_twice() -> None:
    start, at = write_header(HEADER, {})
    for digits in (b"x" * 64, b"AB" * 32, b" " * 64):
        with pytest.raises(DeltaFileError, match="records no SHA-256"):
            recorded_sha256(PATH, start[:at] + digits + start[at + 64 :])
    again = Header({}, "ab" * 32, None, {}, BITMAP, "raw")
    start, at = write_header(again, {})
    with pytest.raises(DeltaFileError, match="or it twice"):
        recorded_sha256(PATH, start[:at] + b"ab" * 32 + start[at + 64 :])
