"""Weights in parts are the whole ones, bit by bit, however they were divided; parts that make no whole are refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from anonymous_memory import measure
from checkpoints.parts_worker import FAMILIES
from helpers import same_bits
from safetensors.torch import load_file, save_file

from subnet_ft import export_delta, extract
from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.models import load_model
from subnet_ft.checkpoints.parts import PartsReader, parts_folder
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.deltas import apply_delta
from subnet_ft.errors import CheckpointError
from subnet_ft.masks import SubnetMask

Part = tuple[list[Any], torch.Tensor]


def write_part(folder: Path, number: int, parts: dict[str, Part]) -> Path:
    """Write the file of one process, as torch does: its tensors, and where each one starts in the whole."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"shard-{number:05}-model-00001-of-00001.safetensors"
    described = {key: {"saved_offsets": at} for key, (at, _) in parts.items()}
    tensors = {key: tensor.clone() for key, (_, tensor) in parts.items()}
    save_file(tensors, file, metadata={"DCP_SHARDING_INFO": json.dumps(described), "format": "pt"})
    return file


def write_parts(folder: Path, *parts: Part) -> Path:
    """Write the parts of one tensor, `weight`, a file for each."""
    for number, part in enumerate(parts, start=1):
        write_part(folder, number, {"weight": part})
    return folder


def reading(folder: Path) -> PartsReader:
    """Open parts of a model whose one parameter is `weight`."""
    return PartsReader(folder, {"weight"})


WHOLE = torch.arange(42, dtype=torch.float32).view(6, 7)


def pieces(reader: PartsReader, key: str, size: int) -> torch.Tensor:
    """Read a tensor through a buffer of `size` bytes, and check that all pieces but the last fill it."""
    found = [piece.clone() for piece in reader.pieces(key, torch.empty(size, dtype=torch.uint8))]
    assert {piece.nbytes for piece in found[:-1]} <= {size}
    return torch.cat(found)


@pytest.mark.parametrize("rows", [[6], [3, 3], [1, 2, 3], [5, 0, 1]])
def test_parts_of_rows_are_the_whole(rows: list[int], tmp_path: Path) -> None:
    starts = itertools.accumulate(rows, initial=0)
    parts = [([start, 0], part) for start, part in zip(starts, WHOLE.split(rows), strict=False)]
    reader = reading(write_parts(tmp_path, *reversed(parts)))
    assert reader["weight"].is_in_rows
    assert same_bits(reader.read("weight"), WHOLE)
    for size in (8, 24, 64, 1024):
        assert same_bits(pieces(reader, "weight", size), WHOLE.view(-1))


def test_parts_of_columns_and_of_both_are_the_whole(tmp_path: Path) -> None:
    columns = reading(write_parts(tmp_path / "columns", ([0, 4], WHOLE[:, 4:]), ([0, 0], WHOLE[:, :4])))
    both = [([0, 0], WHOLE[:2]), ([2, 0], WHOLE[2:, :3]), ([2, 3], WHOLE[2:5, 3:]), ([5, 3], WHOLE[5:, 3:])]
    for reader in (columns, reading(write_parts(tmp_path / "both", *both))):
        assert not reader["weight"].is_in_rows
        assert same_bits(reader.read("weight"), WHOLE)
        for size in (8, 24, 1024):
            assert same_bits(pieces(reader, "weight", size), WHOLE.view(-1))


def test_a_number_is_read(tmp_path: Path) -> None:
    assert reading(write_parts(tmp_path, ([], torch.tensor(3.0)))).read("weight").item() == 3.0


def test_what_is_read_may_be_written_to(tmp_path: Path) -> None:
    reader = reading(write_parts(tmp_path, ([0, 0], WHOLE)))
    reader.read("weight").zero_()
    assert same_bits(reader.read("weight"), WHOLE)


@pytest.mark.parametrize(
    "parts",
    {
        "the first is missing": [([3, 0], WHOLE[3:])],
        "one in the middle is missing": [([0, 0], WHOLE[:2]), ([4, 0], WHOLE[4:])],
        "one is there twice": [([0, 0], WHOLE), ([0, 0], WHOLE)],
        "an older one overlaps": [([0, 0], WHOLE[:3]), ([3, 0], WHOLE[3:]), ([2, 0], WHOLE[2:4])],
        "a gap is as large as an overlap": [([0, 0], WHOLE[:3]), ([2, 0], WHOLE[2:4]), ([5, 0], WHOLE[5:])],
        "columns leave a corner": [([0, 0], WHOLE[:, :4]), ([0, 4], WHOLE[:3, 4:])],
        "a gap beyond all numbers": [([0, 0], WHOLE[:3]), ([2**63 - 7, 2**62], WHOLE[3:])],
        "a number twice": [([], torch.tensor(1.0)), ([], torch.tensor(1.0))],
    }.items(),
    ids=lambda item: item[0],
)
def test_parts_that_make_no_whole_are_refused(parts: tuple[str, list[Part]], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"parts of `weight` in .* leave a gap or overlap at \["):
        reading(write_parts(tmp_path, *parts[1]))


@pytest.mark.parametrize("other", [torch.ones(3), torch.ones(3, 7, dtype=torch.bfloat16)], ids=["rank", "dtype"])
def test_parts_of_other_tensors_are_refused(other: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"parts of `weight` in .* do not belong together"):
        reading(write_parts(tmp_path, ([0, 0], WHOLE[:3]), ([3, 0][: other.dim()], other)))


@pytest.mark.parametrize("at", [[0], [0, 0, 0], [-1, 0], [2**63, 0], [10**400, 0], [0.0, 0], [True, 0], ["0", 0]])
def test_impossible_places_are_refused(at: list[Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"part of `weight`, shape \(6, 7\), at the impossible place"):
        reading(write_parts(tmp_path, (at, WHOLE)))


@pytest.mark.parametrize(
    "told",
    [None, "", "[", "[]", "{}", '{"weight": 3}', '{"weight": {"saved_offsets": 3}}', "[" * 100_000, "1" * 5000],
    ids=["absent", "empty", "no JSON", "a list", "no weight", "a number", "no list", "deep", "a long number"],
)
def test_a_header_that_does_not_say_where_parts_are_is_refused(told: str | None, tmp_path: Path) -> None:
    about = {} if told is None else {"DCP_SHARDING_INFO": told}
    save_file({"weight": WHOLE}, tmp_path / "shard-00001-model-00001-of-00001.safetensors", metadata=about)
    with pytest.raises(CheckpointError, match="does not say which parts of its tensors it holds") as caught:
        reading(tmp_path)
    assert len(str(caught.value)) < 1000


def hostile(folder: Path, field: str, size: int) -> None:
    """Write a part whose header claims a size that its file does not have."""
    entry = {"dtype": "F32", "shape": [size if field == "shape" else 6, 7], "data_offsets": [0, 168]}
    if field == "offsets":
        entry["data_offsets"] = [0, size]
    told = json.dumps({"weight": {"saved_offsets": [0, 0]}})
    header = json.dumps({"__metadata__": {"DCP_SHARDING_INFO": told}, "weight": entry}).encode()
    length = size if field == "header" else len(header)
    folder.mkdir()
    file = folder / "shard-00001-model-00001-of-00001.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + header + bytes(168))


def test_hostile_headers_are_refused_without_memory(tmp_path: Path) -> None:
    for field in ("header", "shape", "offsets"):
        for size in (2**63, 2**63 - 1, 2**40, 10**8):
            hostile(tmp_path / f"{field} {size}", field, size)
    said, megabytes = measure(
        """
from pathlib import Path
from subnet_ft.checkpoints.parts import PartsReader
from subnet_ft.errors import CheckpointError
said = []
with Peak() as peak:
    for folder in Path(sys.argv[1]).iterdir():
        try:
            PartsReader(folder, {"weight"})
        except CheckpointError as error:
            said.append(str(error))
print(json.dumps([said, peak.megabytes]))
""",
        str(tmp_path),
    )
    assert len(said) == 12
    assert all("is not a readable safetensors file" in text for text in said)
    assert megabytes < 20


def test_a_truncated_part_is_refused(tmp_path: Path) -> None:
    write_parts(tmp_path, ([0, 0], WHOLE[:3]), ([3, 0], WHOLE[3:]))
    file = tmp_path / "shard-00002-model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"shard-00002-.*` is not a readable safetensors file"):
        reading(tmp_path)


def test_pieces_notice_that_a_part_has_become_shorter(tmp_path: Path) -> None:
    reader = reading(write_parts(tmp_path, ([0, 0], WHOLE[:3]), ([3, 0], WHOLE[3:])))
    file = tmp_path / "shard-00002-model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"shard-00002-.*` ends within `weight`: it changed"):
        pieces(reader, "weight", 64)


def test_names_and_places_are_no_paths(tmp_path: Path) -> None:
    names = ("../../escaped", "/etc/passwd", "weight")
    write_part(tmp_path / "in", 1, {name: ([0, 0], WHOLE) for name in names})
    reader = reading(tmp_path / "in")
    assert sorted(reader) == sorted(names)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_name_of_the_run_is_left_out_and_other_state_with_it(tmp_path: Path) -> None:
    write_part(
        tmp_path,
        1,
        {
            "run.model.layer.weight": ([0, 0], WHOLE),
            "run.model.bias": ([0], WHOLE[0]),
            "run.optimizer.layer.weight.exp_avg": ([0], WHOLE[0]),
            "other.bias": ([0], WHOLE[0]),
        },
    )
    assert sorted(PartsReader(tmp_path, {"layer.weight", "bias"})) == ["bias", "layer.weight"]


def test_two_models_are_refused(tmp_path: Path) -> None:
    write_part(tmp_path, 1, {"policy.weight": ([0, 0], WHOLE), "average.weight": ([0, 0], WHOLE)})
    with pytest.raises(CheckpointError, match=r"holds 2 models of this kind, under `average\.`, `policy\.`"):
        reading(tmp_path)


def test_whole_files_go_before_parts(saved: Path, tmp_path: Path) -> None:
    assert parts_folder(saved / "llama" / "whole") is None
    assert parts_folder(saved / "llama" / "consolidated") is None
    assert parts_folder(saved / "llama" / "bare") == saved / "llama" / "bare"
    assert parts_folder(saved / "masked" / "checkpoint-2") == saved / "masked" / "checkpoint-2" / "sharded"
    assert parts_folder(tmp_path) is None


WAYS = [*(f"{family}/{way}" for family in FAMILIES for way in ("bare", "nested", "consolidated"))]


@pytest.mark.parametrize("way", [*WAYS, "columns", "transformers", "masked/checkpoint-2"])
def test_open_checkpoint_reads_what_torch_saved_in_parts(way: str, saved: Path) -> None:
    if not (saved / way).is_dir():
        pytest.skip(f"transformers {transformers.__version__} has no `save_pretrained(distributed_checkpoint=True)`")
    whole = saved / way.split("/")[0] / "whole" if "/" in way else saved / "llama" / "whole"
    expected, found = open_checkpoint(whole), open_checkpoint(saved / way)
    assert found.is_in_parts == ("consolidated" not in way)
    assert list(found.specs.items()) == list(expected.specs.items())
    weights = dict(expected.tensors())
    for name, tensor in found.tensors():
        assert same_bits(tensor, weights[name]), name
    for name, cut in found.pieces(1000):
        assert same_bits(torch.cat([piece.clone() for piece in cut]), weights[name].view(-1)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_load_model_loads_what_torch_saved_in_parts(family: str, saved: Path) -> None:
    tokens = torch.arange(2, 22).view(2, 10)
    whole, _ = load_model(saved / family / "whole", dtype="float32")
    model, tokenizer = load_model(saved / family / "nested", dtype="float32")
    expected, found = whole.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(same_bits(value, expected[name]) for name, value in found.items())
    with torch.no_grad():
        assert same_bits(model(tokens).logits, whole(tokens).logits)
    assert not model.training
    assert tokenizer("1")["input_ids"]


def test_a_delta_of_parts_is_that_of_the_whole(saved: Path, tmp_path: Path) -> None:
    base, run = save_tiny("llama", tmp_path / "base"), saved / "masked"
    files = [tmp_path / f"{name}.delta.safetensors" for name in ("parts", "whole")]
    for tuned, file in zip(("checkpoint-2", "whole"), files, strict=True):
        export_delta(base, run / tuned, file)
    parts, whole = (load_file(file) for file in files)
    assert parts.keys() == whole.keys()
    assert len(parts) > 10
    assert all(same_bits(tensor, whole[name]) for name, tensor in parts.items())
    applied = apply_delta(base, files[0], tmp_path / "applied")
    assert all(
        same_bits(tensor, load_file(run / "whole" / "model.safetensors")[name])
        for name, tensor in load_file(applied / "model.safetensors").items()
    )


def test_the_mask_of_parts_is_that_of_the_whole(saved: Path, tmp_path: Path) -> None:
    base, run = save_tiny("llama", tmp_path / "base"), saved / "masked"
    found, expected = extract(base, run / "checkpoint-2"), extract(base, run / "whole")
    assert found.fingerprint == expected.fingerprint
    assert found.provenance.tuned is not None
    assert expected.provenance.tuned is not None
    assert found.provenance.tuned.fingerprints == expected.provenance.tuned.fingerprints
    assert (found & ~SubnetMask.load(run / "mask.subnet.safetensors")).num_trainable == 0


def test_a_process_whose_file_is_missing_is_noticed(saved: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / str(number)
        shutil.copytree(saved / "llama" / "bare", folder)
        next(folder.glob(f"shard-0000{number}-*")).unlink()
        with pytest.raises(CheckpointError, match=r"leave a gap|tensors of another shape"):
            open_checkpoint(folder)


def test_files_of_an_earlier_save_by_more_processes_are_noticed(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "twice"
    shutil.copytree(saved / "llama" / "bare", folder)
    first = next(folder.glob("shard-00001-*"))
    shutil.copy(first, folder / first.name.replace("00001", "00003", 1))
    with pytest.raises(CheckpointError, match="left by an earlier save by more of them"):
        open_checkpoint(folder)


def test_deltas_are_applied_to_whole_files_only(saved: Path, tmp_path: Path) -> None:
    base = tmp_path / "parts"
    shutil.copytree(saved / "masked" / "checkpoint-2", base)
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    delta = export_delta(base, save_tiny("llama", tmp_path / "tuned"), tmp_path / "back.delta.safetensors")
    for where in ({"output": tmp_path / "result"}, {"in_place": True}):
        with pytest.raises(CheckpointError, match="in parts, a file per process, which are only read here"):
            apply_delta(base, delta, **where)  # type: ignore[arg-type]
    assert not (tmp_path / "result").exists()
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before


def test_pieces_of_parts_need_the_memory_of_a_piece(tmp_path: Path) -> None:
    rows = torch.zeros(1 << 11, 1 << 12)  # 32 MiB each
    write_parts(tmp_path, *(([number << 11, 0], rows) for number in range(4)))
    found = measure(
        """
from pathlib import Path
from subnet_ft.checkpoints.parts import PartsReader
reader = PartsReader(Path(sys.argv[1]), {"weight"})
with Peak() as peak:
    count = sum(piece.numel() for piece in reader.pieces("weight", torch.empty(1 << 20, dtype=torch.uint8)))
print(json.dumps([count, peak.megabytes]))
""",
        str(tmp_path),
    )
    assert found[0] == 1 << 25
    assert found[1] < 4
