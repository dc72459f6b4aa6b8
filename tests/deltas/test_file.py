"""The delta file: round trips, and everything that a damaged or hostile file may hold."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_checkpoints import random_case, rewrite, split
from helpers import same_bits
from safetensors.torch import load_file

from subnet_ft.deltas import Delta, DeltaFile
from subnet_ft.errors import DeltaFileError, DeltaMismatchError

SUFFIX = ".delta.safetensors"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what makes files outlive a power cut: thousands of them are written here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A delta of several tensors, one of them unchanged."""
    counts = {seed: [t.count for t in random_case(seed)[2].tensors.values()] for seed in range(100)}
    seed = next(s for s, found in counts.items() if 0 in found and all(count != 1 for count in found) and sum(found))
    return random_case(seed)[2].save(tmp_path / f"d{SUFFIX}")


def round_trip(seed: int, folder: Path) -> None:
    """Save and load a random delta in every form, and apply it to its base in memory."""
    base, tuned, delta = random_case(seed)
    target = folder / f"d{SUFFIX}"
    form = seed % 3
    mask = delta.mask if form == 2 else None
    loaded = Delta.load(delta.save(target, mask=mask, zstd=form == 1), mask)
    assert (loaded.base, loaded.result, loaded.source) == (delta.base, delta.result, delta.source)
    assert list(loaded.tensors) == list(delta.tensors)
    for name, weight in base.items():
        result = weight.clone().view(-1)
        tensor = loaded.tensors[name]
        assert tensor.write(result, 0, 0) == tensor.count
        assert same_bits(result.view(weight.shape), tuned[name]), (seed, name)
        assert same_bits(tensor.values, delta.tensors[name].values)
    if form != 1:
        assert sum(value.nbytes for value in load_file(target).values()) == sum(
            tensor.values.nbytes + (tensor.bits.nbytes if mask is None else 0) for tensor in delta.tensors.values()
        )


def test_save_and_load_round_trip_random_deltas(tmp_path: Path) -> None:
    for seed in range(300):
        round_trip(seed, tmp_path)


@pytest.mark.slow
def test_save_and_load_round_trip_9700_further_random_deltas(tmp_path: Path) -> None:
    for seed in range(300, 10_000):
        round_trip(seed, tmp_path)


@pytest.mark.parametrize("zstd", [False, True])
def test_open_refuses_every_flipped_bit(path: Path, zstd: bool) -> None:
    Delta.load(path).save(path, zstd=zstd)
    data = path.read_bytes()
    for position in range(0, len(data), 1 if len(data) < 3000 else 3):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(DeltaFileError):
            DeltaFile(path)


def test_open_refuses_every_truncation_and_anything_added(path: Path) -> None:
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(DeltaFileError):
            DeltaFile(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(DeltaFileError, match="something was added"):
        DeltaFile(path)


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Return a file with one to three changes at random: bits, bytes of its header, its length, or its end."""
    found = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(found)) if found else 0
        kind = generator.randrange(6)
        if kind == 0 and found:
            found[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            found += generator.randbytes(generator.randint(1, 9))
        elif kind == 3:  # something that JSON knows, in the header
            at = min(at, header - 1)
            found[at : at + generator.randint(0, 3)] = generator.choice(
                [b"0", b"9" * 30, b'"', b"[", b"{}", b"null", b"-", b","]
            )
        elif kind == 4:
            del found[at : at + generator.randint(1, 40)]
        else:
            start = generator.randrange(len(found) + 1)
            found[at:at] = found[start : start + generator.randint(1, 40)]
    return bytes(found)


@pytest.mark.parametrize("zstd", [False, True])
def test_open_refuses_a_thousand_random_changes_or_reads_the_same(path: Path, zstd: bool) -> None:
    original = Delta.load(path)
    data = original.save(path, zstd=zstd).read_bytes()
    generator = random.Random(zstd)
    messages = []
    for number in range(1000):
        path.write_bytes(mutated(data, generator))
        try:
            found = Delta.load(path)
        except DeltaFileError as error:
            messages.append(str(error))
            continue
        assert (found.base, found.result, found.source) == (original.base, original.result, original.source), number
        for name, tensor in original.tensors.items():
            assert torch.equal(found.tensors[name].bits, tensor.bits)
            assert same_bits(found.tensors[name].values, tensor.values), (number, name)
    assert len(messages) > 950
    assert max(map(len, messages)) < 1000


@pytest.mark.parametrize("zstd", [False, True])
def test_open_meets_a_thousand_random_changes_under_a_right_sha256_with_its_own_errors(path: Path, zstd: bool) -> None:
    data = Delta.load(path).save(path, zstd=zstd).read_bytes()
    digits = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["sha256"].encode()
    generator = random.Random(2 + zstd)
    messages = []
    for _ in range(1000):
        changed = mutated(data.replace(digits, b"0" * 64), generator)
        path.write_bytes(changed.replace(b"0" * 64, hashlib.sha256(changed).hexdigest().encode(), 1))
        try:
            found = Delta.load(path)
            found.save(path)
        except DeltaFileError as error:
            messages.append(str(error))
    assert 600 < len(messages) < 1000
    assert max(map(len, messages)) < 1000


def first_changed(header: dict[str, Any]) -> str:
    return next(key for key in header if key.startswith("values/")).removeprefix("values/")


def lie_about(field: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        tensors = json.loads(header["__metadata__"]["tensors"])
        tensors[first_changed(header)][field] = value
        header["__metadata__"]["tensors"] = json.dumps(tensors)

    return change


def metadata(**fields: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update(fields)


def stored(field: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[f"values/{first_changed(header)}"].update({field: value})


def rename(header: dict[str, Any]) -> None:
    name = first_changed(header)
    header["values/../../etc/passwd"] = header.pop(f"values/{name}")


def overlap(header: dict[str, Any]) -> None:
    name = first_changed(header)
    entry = header[f"values/{name}"]
    start, end = entry["data_offsets"]
    entry["data_offsets"] = [start + 1, end + 1]


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another format": (metadata(format="pt"), "format 'pt'"),
    "another version": (metadata(version="2"), "version '2'"),
    "another encoding": (metadata(encoding="pickle"), "encoding 'pickle'"),
    "other positions": (metadata(positions="mask:../x"), "positions 'mask:../x'"),
    "no JSON": (metadata(tensors="{"), "`tensors` is not valid JSON"),
    "a list": (metadata(tensors="[]"), "`tensors` is list"),
    "deep JSON": (metadata(tensors="[" * 100_000), "not valid JSON"),
    "a long number": (metadata(tensors='{"w":' + "9" * 5000 + "}"), "not valid JSON"),
    "a name twice": (metadata(tensors='{"w":1,"w":1}'), "has 'w' twice"),
    "a base of numbers": (metadata(base='{"name":3}'), "base is 3"),
    "a negative size": (lie_about("shape", [-1]), "expected a list of sizes"),
    "a size of 2**63": (lie_about("shape", [2**63]), "expected a list of sizes"),
    "sizes up to 2**63": (lie_about("shape", [2**63 - 1, 2**63 - 1]), "expected a list of sizes"),
    "a size of 2**61": (lie_about("shape", [2**61]), "bytes"),
    "many sizes": (lie_about("shape", [1] * 1000), "expected a list of sizes"),
    "a size that is true": (lie_about("shape", [True]), "expected a list of sizes"),
    "too many values": (lie_about("count", 10**6), "count 1000000"),
    "a value less": (lie_about("count", 1), "needs"),
    "an unknown dtype": (lie_about("dtype", "object"), "'object'"),
    "a wrong dtype": (lie_about("dtype", "float64"), "'float64'"),
    "a short fingerprint": (lie_about("base", "00"), "not 32 hexadecimal digits"),
    "a field too many": (lie_about("path", "x"), "does not have exactly shape"),
    "overlapping bytes": (overlap, "overlap"),
    "a path as a name": (rename, "stored but not described|described but not stored"),
    "offsets beyond the file": (stored("data_offsets", [0, 2**62]), "cannot lie at"),
    "offsets backwards": (stored("data_offsets", [8, 0]), "cannot lie at"),
    "a stored matrix": (stored("shape", [1, 1]), "not a vector|expected a vector"),
    "a stored dtype": (stored("dtype", "F64"), "'F64'"),
    "stored text": (stored("shape", "big"), "'big'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_open_refuses_a_header_that_lies(case: str, path: Path) -> None:
    change, message = HOSTILE[case]
    header, payload = split(path)
    change(header)
    rewrite(path, header, payload)
    with pytest.raises(DeltaFileError, match=message):
        DeltaFile(path)


def test_open_refuses_a_tensor_twice_in_the_outer_header(path: Path) -> None:
    header, payload = split(path)
    text = json.dumps(header).encode()
    name = json.dumps(f"values/{first_changed(header)}").encode()
    rewrite(path, text[:-1] + b"," + name + b': {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', payload)
    with pytest.raises(DeltaFileError, match="twice"):
        DeltaFile(path)


@pytest.mark.parametrize("length", [0, 1, 2**25 + 1, 2**62, 2**63, 2**64 - 1])
def test_open_refuses_an_absurd_header_length_without_reading_it(path: Path, length: int) -> None:
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(DeltaFileError, match="announces a header of"):
        DeltaFile(path)


def test_open_allocates_nothing_for_sizes_that_only_the_header_has(path: Path) -> None:
    header, payload = split(path)
    lie_about("shape", [2**40])(header)
    rewrite(path, header, payload)

    tracemalloc.start()
    try:
        with pytest.raises(DeltaFileError):
            DeltaFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_open_refuses_padding_bits_and_a_wrong_count(tmp_path: Path) -> None:
    _, _, delta = random_case(next(s for s in range(200) if _has_padding(random_case(s)[2])))
    name = next(n for n, t in delta.tensors.items() if t.count and t.num_elements % 8)
    path = delta.save(tmp_path / f"d{SUFFIX}")
    header, payload = split(path)
    end = header[f"bits/{name}"]["data_offsets"][1]
    rewrite(path, header, payload[: end - 1] + bytes([payload[end - 1] | 0x80]) + payload[end:])
    with pytest.raises(DeltaFileError, match="padding bits"):
        DeltaFile(path).tensor(name)
    start = header[f"bits/{name}"]["data_offsets"][0]
    rewrite(path, header, payload[:start] + bytes([payload[start] ^ 1]) + payload[start + 1 :])
    with pytest.raises(DeltaFileError, match="bits set but its header says"):
        DeltaFile(path).tensor(name)


def _has_padding(delta: Delta) -> bool:
    return any(tensor.count and tensor.num_elements % 8 for tensor in delta.tensors.values())


def test_open_checks_the_mask_that_a_file_refers_to(tmp_path: Path) -> None:
    _, _, delta = random_case(next(s for s in range(100) if random_case(s)[2].num_values > 3))
    path = delta.save(tmp_path / f"d{SUFFIX}", mask=delta.mask)
    name = next(name for name, tensor in delta.tensors.items() if tensor.count)
    assert same_bits(DeltaFile(path, delta.mask).tensor(name).values, delta.tensors[name].values)
    with pytest.raises(DeltaMismatchError, match=r"no positions of its own.*--mask"):
        DeltaFile(path).tensor(name)
    with pytest.raises(DeltaMismatchError, match="needs the mask with the fingerprint"):
        DeltaFile(path, ~delta.mask)
    with pytest.raises(DeltaMismatchError, match="has its own positions"):
        DeltaFile(delta.save(path), delta.mask)
    with pytest.raises(DeltaMismatchError, match="a mask of exactly its positions"):
        delta.save(path, mask=~delta.mask)


def test_open_names_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DeltaFileError, match="is a folder"):
        DeltaFile(tmp_path)
    with pytest.raises(DeltaFileError, match="no delta file at"):
        DeltaFile(tmp_path / f"x{SUFFIX}")


def test_save_leaves_nothing_else_and_names_a_bad_path(path: Path, tmp_path: Path) -> None:
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    delta = Delta.load(path)
    (tmp_path / "file").touch()
    for target, message in (
        (tmp_path / "d.safetensors", "does not end in"),
        (tmp_path / "file" / f"d{SUFFIX}", "is a file"),
    ):
        with pytest.raises(DeltaFileError, match=message):
            delta.save(target)
