"""Writing delta files: whole or not at all, aligned, and nothing left beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from delta_checkpoints import random_case, split, unchanged

from subnet_ft.deltas import Delta, DeltaFile, TensorDelta
from subnet_ft.deltas.writing import DeltaWriter, check_writable, save_delta
from subnet_ft.errors import DeltaError, DeltaFileError, DeltaMismatchError
from subnet_ft.masks import ModelRecord

SUFFIX = ".delta.safetensors"
SEED = next(
    s for s in range(100) if {e.dtype for e in random_case(s)[2].entries.values() if e.count} >= {"float32", "bfloat16"}
)
"""A delta with new values in two widths."""


@pytest.fixture
def delta() -> Delta:
    found = random_case(SEED)[2]
    assert found.num_values
    return found


@pytest.mark.parametrize("zstd", [False, True])
def test_writer_gives_the_file_of_save_and_its_sha256(zstd: bool, delta: Delta, tmp_path: Path) -> None:
    path = save_delta(delta, tmp_path / f"d{SUFFIX}", zstd=zstd)
    with DeltaWriter(tmp_path / f"e{SUFFIX}", delta.base, delta.source, zstd=zstd) as writer:
        for name, entry in delta.entries.items():
            writer.add(name, entry, delta.tensors[name])
    assert path.read_bytes() == writer.path.read_bytes()
    opened = DeltaFile(path)
    assert (opened.sha256, opened.nbytes) == (writer.sha256, writer.nbytes)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"d{SUFFIX}", f"e{SUFFIX}"]


def test_save_puts_wider_tensors_first_so_that_all_are_aligned(tmp_path: Path) -> None:
    width = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
    for seed in range(50):
        header, payload = split(random_case(seed)[2].save(tmp_path / f"d{SUFFIX}"))
        stored = [entry for key, entry in header.items() if key != "__metadata__"]
        assert all(entry["data_offsets"][0] % width[entry["dtype"]] == 0 for entry in stored)
        widths = [width[entry["dtype"]] for entry in stored]
        assert widths == sorted(widths, reverse=True)
        assert max((entry["data_offsets"][1] for entry in stored), default=0) == len(payload)


def test_save_keeps_the_file_that_was_there_when_it_fails(
    delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = delta.save(tmp_path / f"d{SUFFIX}")

    def refuse(*arguments: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    with unchanged(tmp_path), monkeypatch.context() as context:
        for name in ("fsync", "replace"):
            context.setattr(os, name, refuse)
            with pytest.raises(DeltaFileError, match="cannot be written: No space left on device"):
                delta.save(path, zstd=True)
            with pytest.raises(DeltaFileError, match="No space left"):
                delta.save(tmp_path / f"new{SUFFIX}")
            context.undo()


def test_writer_leaves_nothing_after_an_error_or_a_key(delta: Delta, tmp_path: Path) -> None:
    name, entry = next((name, entry) for name, entry in delta.entries.items() if entry.count)
    for error in (RuntimeError, KeyboardInterrupt):
        writer = DeltaWriter(tmp_path / f"d{SUFFIX}", delta.base, delta.source)
        with unchanged(tmp_path), pytest.raises(error), writer:  # noqa: PT012 - what is raised between, is the point
            writer.add(name, entry, delta.tensors[name])
            raise error


@pytest.mark.parametrize("source", [{"a": torch.zeros(1)}, {"a": float("nan")}, {"a": {1, 2}}, {(1, 2): 3}])
def test_save_refuses_a_source_that_is_no_json(source: dict[str, object], delta: Delta, tmp_path: Path) -> None:
    odd = Delta(delta.tensors, delta.base, delta.result, source)
    with unchanged(tmp_path), pytest.raises(DeltaError, match="written as JSON, and this is none"):
        odd.save(tmp_path / f"d{SUFFIX}")


def test_save_refuses_what_no_reader_would_take_and_leaves_nothing(
    delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, tensor = next((name, tensor) for name, tensor in delta.tensors.items() if tensor.count > 1)
    less = TensorDelta(tensor.bits, tensor.values[1:], tensor.shape)
    deep: dict[str, object] = {}
    for _ in range(40):
        deep = {"a": deep}
    long = {"x" * 1025: TensorDelta.build(tensor.bits[:0], tensor.values[:0], (3,))}
    record = ModelRecord("b", None, dict.fromkeys(long, delta.base.dtypes[name]), dict.fromkeys(long, "0" * 32))
    with unchanged(tmp_path):
        for odd, message in (
            (Delta({**delta.tensors, name: less}, delta.base, delta.result), "bits set but its header says"),
            (Delta(delta.tensors, delta.base, {**delta.result, name: "no fingerprint"}), "not 32 hexadecimal digits"),
            (Delta(delta.tensors, delta.base, delta.result, deep), "nests more than 32 deep"),
            (Delta(delta.tensors, ModelRecord("b" * 4097, None, *_of(delta)), delta.result), "at most 4096 characters"),
            (Delta(long, record, record.fingerprints), "1,025 letters"),
        ):
            with pytest.raises(DeltaFileError, match=message):
                odd.save(tmp_path / f"d{SUFFIX}")
        monkeypatch.setattr("subnet_ft.deltas.header.MAX_HEADER", 100)
        with pytest.raises(DeltaFileError, match="at most 100 are read"):
            delta.save(tmp_path / f"d{SUFFIX}")


def _of(delta: Delta) -> tuple[dict[str, str], dict[str, str]]:
    return delta.base.dtypes, delta.base.fingerprints


def test_save_replaces_a_link_and_not_what_it_points_to(delta: Delta, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    target = tmp_path / "other" / "precious"
    target.write_text("precious")
    link = tmp_path / f"d{SUFFIX}"
    link.symlink_to(target)
    with unchanged(tmp_path / "other"):
        delta.save(link)
    assert not link.is_symlink()
    assert Delta.load(link).num_values == delta.num_values


def test_save_with_a_mask_refuses_other_positions(delta: Delta, tmp_path: Path) -> None:
    with unchanged(tmp_path), pytest.raises(DeltaMismatchError, match="exactly its positions"):
        delta.save(tmp_path / f"d{SUFFIX}", mask=~delta.mask)
    path = delta.save(tmp_path / f"d{SUFFIX}", mask=delta.mask)
    assert not [key for key in split(path)[0] if key.startswith("bits/")]
    assert json.loads(split(path)[0]["__metadata__"]["tensors"]).keys() == delta.tensors.keys()


def test_save_writes_values_that_are_views_of_others(tmp_path: Path) -> None:
    delta = random_case(SEED)[2]
    tensors = {
        name: type(tensor)(tensor.bits, torch.stack([tensor.values, tensor.values], 1)[:, 0], tensor.shape)
        for name, tensor in delta.tensors.items()
    }
    assert not all(tensor.values.is_contiguous() for tensor in tensors.values())
    path = Delta(tensors, delta.base, delta.result, delta.source).save(tmp_path / f"v{SUFFIX}")
    assert path.read_bytes() == delta.save(tmp_path / f"d{SUFFIX}").read_bytes()


def test_check_writable_creates_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / f"folder{SUFFIX}").mkdir()
    with unchanged(tmp_path):
        check_writable(tmp_path / "new" / "deeper" / f"d{SUFFIX}")
        for path, message in (
            (tmp_path / "d.safetensors", "does not end in"),
            (tmp_path / f"folder{SUFFIX}", "is a folder"),
            (tmp_path / "file" / f"d{SUFFIX}", "is a file"),
            (tmp_path / "file" / "deeper" / f"d{SUFFIX}", "is a file|Not a directory"),
            (tmp_path / ("x" * 300 + SUFFIX), "too long"),
        ):
            with pytest.raises(DeltaFileError, match=message):
                check_writable(path)
