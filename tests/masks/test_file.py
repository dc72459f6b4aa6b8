"""The mask file: a round trip, its bytes, and everything a damaged or hostile file may hold."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import random_bits
from safetensors.torch import load_file, save_file

from subnet_ft.errors import MaskFileError, MaskMismatchError
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask, check_writable
from subnet_ft.masks import file as file_module


@pytest.fixture
def mask() -> SubnetMask:
    provenance = Provenance(
        base=ModelRecord(
            "base/model", "main", {"w": "bfloat16", "empty": "float32"}, {"w": "ab" * 16, "empty": "0" * 32}
        ),
        tuned=ModelRecord("tuned"),
        criterion="absolute",
        tolerance=1e-5,
        source={"kind": "extract", "step": 40},
        density_by_tolerance={"0": 0.25, "1e-05": 0.2},
    )
    dense = {"w": random_bits(77, 0.3).view(7, 11), "empty": torch.zeros(3, dtype=torch.bool)}
    return SubnetMask.from_dense(dense, provenance)


def rewrite(path: Path, metadata: dict[str, str] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    save_file(load_file(path) if tensors is None else tensors, path, metadata={**old, **(metadata or {})})


def test_save_and_load_round_trip_bits_and_provenance(mask: SubnetMask, tmp_path: Path) -> None:
    path = mask.save(tmp_path / "sub" / "run.subnet.safetensors")
    loaded = SubnetMask.load(path)
    assert loaded == mask
    assert loaded.names == mask.names
    assert loaded.provenance == mask.provenance


def test_save_stores_one_bit_per_weight_and_nothing_for_empty_tensors(mask: SubnetMask, tmp_path: Path) -> None:
    stored = load_file(mask.save(tmp_path / "m.subnet.safetensors"))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in stored.items()} == {"w": (torch.uint8, (10,))}
    assert int(stored["w"][0]) & 1 == int(mask["w"].view(-1)[0])


def test_save_leaves_nothing_else_in_the_folder(mask: SubnetMask, tmp_path: Path) -> None:
    mask.save(tmp_path / "m.subnet.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.subnet.safetensors"]


def test_load_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MaskFileError, match="no mask file at"):
        SubnetMask.load(tmp_path / "nothing.safetensors")


def test_load_refuses_what_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "m.subnet.safetensors"
    path.write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(MaskFileError, match="not a readable safetensors file"):
        SubnetMask.load(path)


def test_load_refuses_a_truncated_file(mask: SubnetMask, tmp_path: Path) -> None:
    path = mask.save(tmp_path / "m.subnet.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MaskFileError, match="not a readable safetensors file"):
        SubnetMask.load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "format 'pt'"),
        ({"version": "2"}, "version '2'"),
        ({"tensors": "{"}, "`tensors` is not JSON"),
        ({"tensors": "[]"}, "`tensors` is list"),
        ({"tensors": "[" * 100_000}, "`tensors` is not JSON"),
        ({"tensors": '{"w": ' + "9" * 5000 + "}"}, "`tensors` is not JSON"),
        ({"tensors": json.dumps({"w": {"shape": [7, 11], "count": 78}})}, "has count 78"),
        ({"tensors": json.dumps({"w": {"shape": [7, -11], "count": 1}})}, r"shape \[7, -11\]"),
        ({"tensors": json.dumps({"w": {"shape": [True, 77], "count": 1}})}, r"shape \[True, 77\]"),
        ({"tensors": json.dumps({"w": 3})}, "shape None"),
        ({"tensors": json.dumps({"w": {"shape": [2**62, 2], "count": 5}})}, r"bits of `w` are torch\.uint8 \(10,\)"),
        ({"tensors": json.dumps({"v": {"shape": [77], "count": 5}})}, "tensor `v` is described but not stored"),
        ({"tensors": json.dumps({})}, "tensor `w` is stored but not described"),
        ({"provenance": json.dumps({"nonsense": 1})}, "provenance cannot be read: .*unknown field `nonsense`"),
        ({"provenance": json.dumps({"tolerance": "0"})}, "provenance cannot be read: `tolerance` is '0'"),
        ({"provenance": json.dumps({"base": {"name": "b"}})}, "base `b` has no fingerprint of `w`"),
    ],
)
def test_load_refuses_a_header_that_lies(
    mask: SubnetMask, tmp_path: Path, metadata: dict[str, str], message: str
) -> None:
    path = mask.save(tmp_path / "m.subnet.safetensors")
    rewrite(path, metadata)
    with pytest.raises(MaskFileError, match=message):
        SubnetMask.load(path)


@pytest.mark.parametrize("part", ["fingerprints", "dtypes"])
@pytest.mark.parametrize("change", [{}, {"empty": None}, {"odd": "ab" * 16}])
def test_load_refuses_a_base_that_could_not_be_checked(
    mask: SubnetMask, tmp_path: Path, part: str, change: dict[str, str | None]
) -> None:
    path = mask.save(tmp_path / "m.subnet.safetensors")
    provenance = asdict(mask.provenance)
    entries = {**provenance["base"][part], **change} if change else {}
    provenance["base"][part] = {name: entry for name, entry in entries.items() if entry is not None}
    rewrite(path, {"provenance": json.dumps(provenance)})
    with pytest.raises(MaskFileError, match=r"base `base/model` has (no|a) .* so the base cannot be checked"):
        SubnetMask.load(path)


def test_save_refuses_a_base_that_could_not_be_checked(mask: SubnetMask, tmp_path: Path) -> None:
    named = SubnetMask(mask.tensors, replace(mask.provenance, base=ModelRecord("base/model")))
    with pytest.raises(MaskFileError, match="base `base/model` has no fingerprint of `w`"):
        named.save(tmp_path / "m.subnet.safetensors")
    assert list(tmp_path.iterdir()) == []
    SubnetMask(mask.tensors, replace(mask.provenance, base=None)).save(tmp_path / "m.subnet.safetensors")


def test_check_writable_accepts_a_new_and_an_old_file_and_creates_nothing(mask: SubnetMask, tmp_path: Path) -> None:
    check_writable(tmp_path / "deep" / "er" / "m.subnet.safetensors")
    assert list(tmp_path.iterdir()) == []
    check_writable(mask.save(tmp_path / "m.subnet.safetensors"))


def test_check_writable_names_a_folder_and_a_file_in_the_way(
    mask: SubnetMask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path, r"is a folder\. Name the file in it, such as `.*run\.subnet\.safetensors`"),
        (tmp_path / "file" / "m.safetensors", "file` is a file, not a folder"),
        (tmp_path / "file" / "deep" / "m.safetensors", "cannot be written: "),
        (tmp_path / ("x" * 300) / "m.safetensors", "cannot be written: File name too long"),
    ):
        for attempt in (check_writable, mask.save):
            with pytest.raises(MaskFileError, match=message):
                attempt(path)
    monkeypatch.setattr(file_module.os, "access", lambda folder, mode: folder != tmp_path)
    with pytest.raises(MaskFileError, match=r"no permission to write in `.*another folder, or change"):
        check_writable(tmp_path / "new" / "m.safetensors")


def test_save_names_the_path_when_the_disk_refuses(
    mask: SubnetMask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    path = tmp_path / "m.subnet.safetensors"
    with pytest.raises(MaskFileError, match=r"m\.subnet\.safetensors` cannot be written: Permission denied\. Choose"):
        mask.save(path)


def test_load_names_a_folder_and_a_file_that_may_not_be_read(
    mask: SubnetMask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MaskFileError, match="is a folder, not a mask file"):
        SubnetMask.load(tmp_path)
    path = mask.save(tmp_path / "m.subnet.safetensors")

    def refuse(path: Path, framework: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(file_module, "safe_open", refuse)
    with pytest.raises(MaskFileError, match=r"cannot be read: Permission denied\. Check its permissions"):
        SubnetMask.load(path)


def test_load_refuses_set_padding_bits_and_wrong_counts(mask: SubnetMask, tmp_path: Path) -> None:
    path = mask.save(tmp_path / "m.subnet.safetensors")
    bits = load_file(path)["w"]
    padded = bits.clone()
    padded[-1] |= 0x80
    rewrite(path, tensors={"w": padded})
    with pytest.raises(MaskFileError, match="padding bits of `w` are set"):
        SubnetMask.load(path)
    flipped = bits.clone()
    flipped[0] ^= 1
    rewrite(path, tensors={"w": flipped})
    with pytest.raises(MaskFileError, match="bits set but its header says"):
        SubnetMask.load(path)


def test_load_with_a_base_refuses_another_model(tmp_path: Path) -> None:
    from subnet_ft.checkpoints import open_checkpoint
    from subnet_ft.checkpoints.tiny import save_tiny
    from subnet_ft.masks import extract

    base, tuned = (save_tiny("llama", tmp_path / str(seed), seed=seed) for seed in (0, 1))
    path = extract(base, tuned).save(tmp_path / "m.subnet.safetensors")
    assert SubnetMask.load(path, base=base).num_trainable > 0
    with pytest.raises(MaskMismatchError, match="not those that the mask was made for"):
        SubnetMask.load(path, base=open_checkpoint(tuned))


def test_load_with_a_base_accepts_the_folder_that_a_cast_mask_came_from(tmp_path: Path) -> None:
    from subnet_ft.checkpoints.tiny import save_tiny
    from subnet_ft.masks import extract

    base, tuned = (save_tiny("llama", tmp_path / str(seed), seed=seed, dtype=torch.float32) for seed in (0, 1))
    path = extract(base, tuned, dtype="bfloat16").save(tmp_path / "m.subnet.safetensors")
    assert SubnetMask.load(path, base=base).provenance.compare_dtype == "bfloat16"
    with pytest.raises(MaskMismatchError, match="not those that the mask was made for"):
        SubnetMask.load(path, base=tuned)
