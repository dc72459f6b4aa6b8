"""Reading safetensors: what is damaged or unclear is refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import same_bits
from safetensors.torch import save_file

from subnet_ft.checkpoints.shards import ShardReader
from subnet_ft.errors import CheckpointError


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(4.0)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def resident_megabytes() -> float:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shard_reader_reads_headers_and_tensors(sharded: Path) -> None:
    reader = ShardReader(sharded)
    assert list(reader) == ["a", "b"]
    assert reader["b"].spec("b").shape == (2, 3)
    assert reader["b"].spec("b").dtype == torch.bfloat16
    assert reader.read("a").tolist() == [0.0, 1.0, 2.0, 3.0]


def test_shard_reader_reads_every_dtype_shape_and_offset(tmp_path: Path) -> None:
    tensors = {
        "empty": torch.empty(0, 3),
        "one": torch.tensor([1.5], dtype=torch.float16),
        "odd": torch.randn(7, dtype=torch.bfloat16),
        "matrix": torch.randn(301, 33),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "data_offsets": "none"})
    reader = ShardReader(tmp_path)
    buffer = torch.empty(64, dtype=torch.uint8)
    for key, tensor in tensors.items():
        assert same_bits(reader.read(key), tensor)
        pieces = [piece.clone() for piece in reader.pieces(key, buffer)]
        assert same_bits(torch.cat([torch.empty(0, dtype=tensor.dtype), *pieces]), tensor.view(-1))


def test_shard_reader_reads_a_tensor_that_may_be_written_to(sharded: Path) -> None:
    reader = ShardReader(sharded)
    reader.read("a").zero_()
    assert reader.read("a").tolist() == [0.0, 1.0, 2.0, 3.0]


def test_pieces_fill_the_buffer_and_overwrite_it(sharded: Path) -> None:
    pieces = ShardReader(sharded).pieces("b", torch.empty(8, dtype=torch.uint8))
    first = next(pieces)
    assert first.tolist() == [1.0] * 4
    first.zero_()
    assert next(pieces).tolist() == [1.0] * 2
    assert first.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_pieces_notice_that_a_file_has_become_shorter(sharded: Path) -> None:
    reader = ShardReader(sharded)
    file = sharded / "two.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"two\.safetensors` ends within `b`: it changed while it was read"):
        list(reader.pieces("b", torch.empty(64, dtype=torch.uint8)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_tensor_that_is_dropped_is_no_longer_resident(tmp_path: Path) -> None:
    save_file({name: torch.zeros(1 << 23) for name in "abcd"}, tmp_path / "model.safetensors")
    reader = ShardReader(tmp_path)
    assert not reader.read("a").any()  # what torch needs for it stays
    before = resident_megabytes()
    for key in reader:
        assert not reader.read(key).any()
    assert resident_megabytes() - before < 60  # all four have 128 MB


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
