"""Zstandard frames: exactly one, of exactly the size that is asked for; no memory for what a frame only claims."""

from __future__ import annotations

import importlib.util
import json
import resource
import struct
from pathlib import Path

import pytest
import torch
import zstandard
from delta_checkpoints import random_case, record, rewrite, save_pair, split, unchanged

from subnet_ft.cli import main
from subnet_ft.deltas import Delta, DeltaFile, TensorDelta, apply_delta, export_delta, verify_delta
from subnet_ft.deltas.compression import compress, decompress
from subnet_ft.errors import DeltaFileError, MissingDependencyError

SUFFIX = ".delta.safetensors"
NBYTES = 10_000_000
ZEROS = compress(bytes(NBYTES))


def peak() -> int:
    """Return the most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stating(size: int) -> bytes:
    """Return a short frame that states any decoded size and holds nothing."""
    return b"\x28\xb5\x2f\xfd" + bytes([0b1110_0000]) + struct.pack("<Q", size) + b"\x01\x00\x00"


def lying(size: int) -> bytes:
    """Return the frame of `NBYTES` zeros, which states another size."""
    assert ZEROS.count(struct.pack("<I", NBYTES)) == 1
    return ZEROS.replace(struct.pack("<I", NBYTES), struct.pack("<I", size))


@pytest.mark.parametrize("data", [b"", b"a", bytes(range(256)) * 1000, bytes(1 << 24)])
def test_decompress_undoes_compress(data: bytes) -> None:
    assert decompress(compress(data), len(data)) == data


@pytest.mark.parametrize(
    ("frame", "nbytes", "message"),
    {
        "nothing": (b"", 0, "not enough data"),
        "no frame": (b"not a frame at all", 10, "Unknown frame descriptor"),
        "another size": (ZEROS, NBYTES + 1, "states a size of 10,000,000 bytes, expected 10,000,001"),
        "more than it states": (lying(100), 100, "too small"),
        "less than it states": (lying(NBYTES + 1), NBYTES + 1, "corruption"),
        "truncated": (ZEROS[:-3], NBYTES, "full frame"),
        "two frames": (ZEROS + ZEROS, NBYTES, "unused data"),
        "a byte behind it": (ZEROS + b"\0", NBYTES, "unused data"),
        "no stated size": (
            zstandard.ZstdCompressor(write_content_size=False).compress(b"abc"),
            3,
            "states a size of 18,",
        ),
        "a skippable frame": (b"\x50\x2a\x4d\x18\x04\0\0\0abcd", 4, "(decompressed|holds) 0 bytes[;,] expected 4"),
    }.values(),
)
def test_decompress_refuses_every_other_frame(frame: bytes, nbytes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompress(frame, nbytes)


@pytest.mark.parametrize("power", [26, 30, 33, 40, 62])
def test_decompress_allocates_nothing_for_a_size_that_a_frame_cannot_have(power: int) -> None:
    before = peak()
    with pytest.raises(ValueError, match=r"cannot stand for as many"):
        decompress(stating(1 << power), 1 << power)
    assert peak() - before < 1 << 24


def test_decompress_of_the_densest_frame_is_within_the_bound() -> None:
    data = bytes(1 << 27)
    frame = compress(data)
    assert len(data) / len(frame) > 32_000
    assert len(decompress(frame, len(data))) == len(data)


def test_decompress_says_what_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def decompress(self, *arguments: object, **settings: object) -> bytes:
            raise MemoryError

    monkeypatch.setattr(zstandard, "ZstdDecompressor", Full)
    with pytest.raises(ValueError, match="10,000,000 bytes do not fit into memory"):
        decompress(ZEROS, NBYTES)


def with_bits(path: Path, frame: bytes, size: int, count: int) -> Path:
    """Put another frame in the place of the bits of `w`, and say that it has another size."""
    header, payload = split(path)
    start, end = header["bits/w"]["data_offsets"]
    values = payload[slice(*header["values/w"]["data_offsets"])]
    assert (start, end) != (0, len(payload))
    header["bits/w"] = {"dtype": "U8", "shape": [len(frame)], "data_offsets": [0, len(frame)]}
    header["values/w"]["data_offsets"] = [len(frame), len(frame) + len(values)]
    tensors = json.loads(header["__metadata__"]["tensors"])
    tensors["w"] |= {"shape": [size], "count": count}
    header["__metadata__"]["tensors"] = json.dumps(tensors)
    rewrite(path, header, frame + values)
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A compressed delta of one tensor of 8,000 weights, of which 8 change."""
    base = {"w": torch.zeros(8000)}
    tuned = {"w": torch.cat([torch.ones(8), torch.zeros(7992)])}
    bits = torch.zeros(1000, dtype=torch.uint8)
    bits[0] = 255
    delta = Delta({"w": TensorDelta(bits, torch.ones(8), (8000,))}, record(base), record(tuned).fingerprints)
    return delta.save(tmp_path / f"d{SUFFIX}", zstd=True)


@pytest.mark.parametrize(
    ("frame", "size"),
    [
        (ZEROS, 8000),  # a bomb: the header says 1,000 bytes, the frame decodes to 10 million
        (lying(1000), 8000),  # the same, and the frame says 1,000, too
        (stating(1 << 40), 1 << 43),  # header and frame agree on a terabyte that is not there
    ],
)
def test_a_delta_file_with_a_bomb_is_refused_in_bounded_memory(frame: bytes, size: int, packed: Path) -> None:
    assert Delta.load(packed).num_values == 8
    path = with_bits(packed, frame, size, 8)
    before = peak()
    with unchanged(path.parent), pytest.raises(DeltaFileError, match="`bits/w` cannot be decompressed"):
        DeltaFile(path).tensor("w")
    assert peak() - before < 1 << 24


def test_apply_and_verify_compare_shapes_with_the_base_before_they_decode(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path)
    path = export_delta(base, tuned, tmp_path / f"d{SUFFIX}", zstd=True).path
    header, payload = split(path)
    tensors = json.loads(header["__metadata__"]["tensors"])
    tensors["model.norm.weight"]["shape"] = [8 * NBYTES]
    header["__metadata__"]["tensors"] = json.dumps(tensors)
    rewrite(path, header, payload)
    before = peak()
    for job in (
        lambda: apply_delta(base, path, tmp_path / "out"),
        lambda: apply_delta(base, path, in_place=True),
        lambda: verify_delta(base, path),
    ):
        with unchanged(tmp_path), pytest.raises(ValueError, match="has shape"):
            job()
    assert peak() - before < 1 << 24


def test_compressed_deltas_name_the_extra_where_zstandard_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    delta = random_case(1)[2]
    packed, plain = delta.save(tmp_path / f"d{SUFFIX}", zstd=True), delta.save(tmp_path / f"p{SUFFIX}")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "zstandard" else find(name, *rest)
    )
    with unchanged(tmp_path):
        with pytest.raises(MissingDependencyError, match=r"subnet-ft\[zstd\]"):
            DeltaFile(packed)
        with pytest.raises(MissingDependencyError, match=r"to compress a delta.*subnet-ft\[zstd\]"):
            delta.save(tmp_path / f"x{SUFFIX}", zstd=True)
        assert main(["delta", "info", str(packed), "-q"]) == 2
        assert "subnet-ft[zstd]" in capsys.readouterr().err
        assert DeltaFile(plain).delta().num_values == delta.num_values
