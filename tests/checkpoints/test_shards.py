"""Reading safetensors: what is damaged or unclear is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from subnet_ft.checkpoints.shards import ShardReader
from subnet_ft.errors import CheckpointError


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(4.0)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shard_reader_reads_headers_and_tensors(sharded: Path) -> None:
    reader = ShardReader(sharded)
    assert list(reader) == ["a", "b"]
    assert reader["b"].spec("b").shape == (2, 3)
    assert reader["b"].spec("b").dtype == torch.bfloat16
    assert reader.read("a").tolist() == [0.0, 1.0, 2.0, 3.0]


def test_shard_reader_prefers_the_single_file(sharded: Path) -> None:
    save_file({"c": torch.zeros(1)}, sharded / "model.safetensors")
    assert list(ShardReader(sharded)) == ["c"]


def test_shard_reader_refuses_a_missing_shard(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard `two\.safetensors`, which is not there"):
        ShardReader(sharded)


def test_shard_reader_refuses_a_truncated_file(sharded: Path) -> None:
    file = sharded / "two.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"two\.safetensors` is not a readable safetensors file"):
        ShardReader(sharded)


def test_shard_reader_refuses_an_index_of_absent_tensors(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"names 1 tensors that its shards do not hold, such as `c`"):
        ShardReader(sharded)


def test_shard_reader_refuses_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"a": torch.zeros(4), "b": torch.ones(2)}, sharded / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"`a` is in `one\.safetensors` and in `two\.safetensors`"):
        ShardReader(sharded)


@pytest.mark.parametrize("name", ["../one.safetensors", "/etc/passwd", "", 3])
def test_shard_reader_refuses_an_index_that_leaves_the_folder(name: object, sharded: Path) -> None:
    write_index(sharded, {"a": name})
    with pytest.raises(CheckpointError, match="not a file name in that folder"):
        ShardReader(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {"a": ["one.safetensors"]}])
def test_shard_reader_refuses_a_malformed_index(weight_map: object, sharded: Path) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match="not a valid index of shards"):
        ShardReader(sharded)


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("pytorch_model.bin", "never loaded here because unpickling runs code"),
        ("tiny.gguf", r"only a GGUF\. Name the file itself"),
        ("adapter_model.safetensors", "only safetensors files of other names"),
        ("notes.txt", r"it holds notes\.txt"),
    ],
)
def test_shard_reader_says_what_a_folder_holds_instead(file: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=hint):
        ShardReader(tmp_path)
