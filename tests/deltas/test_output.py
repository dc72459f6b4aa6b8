"""Weight files with the layout of others: headers, buffers, places, errors of the disk, and room."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from delta_checkpoints import save_pair, unchanged
from safetensors.torch import load_file, save_file

from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.deltas import output
from subnet_ft.deltas.output import ShardWriter, check_room
from subnet_ft.errors import DeltaError

BUFFER = "model.rotary_emb.inv_freq"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A checkpoint of three files, one of which also has a buffer."""
    base = save_pair(tmp_path, shard="20KB")[0]
    file = sorted(base.glob("*.safetensors"))[1]
    save_file(load_file(file) | {BUFFER: torch.arange(5)}, file, metadata={"format": "pt"})
    opened = open_checkpoint(base)
    assert BUFFER in opened.ignored
    return opened


def targets(checkpoint: Checkpoint, folder: Path) -> dict[Path, Path]:
    folder.mkdir()
    return {file: folder / file.name for file in sorted({stored.file for stored in checkpoint.stored.values()})}


def data_of(checkpoint: Checkpoint, key: str) -> torch.Tensor:
    return checkpoint.read_stored(key).reshape(-1).view(torch.uint8).clone()


def weight_keys(checkpoint: Checkpoint) -> list[str]:
    return [key for key in checkpoint.stored if key not in checkpoint.ignored]


@pytest.mark.parametrize("size", [64, 1000, 1 << 20])
def test_writer_makes_the_files_of_the_base_from_pieces_in_any_order(
    size: int, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    files = targets(checkpoint, tmp_path / "out")
    with unchanged(checkpoint.folder), ShardWriter(checkpoint, files) as writer:
        for key in reversed(weight_keys(checkpoint)):
            data = data_of(checkpoint, key)
            for start in reversed(range(0, data.numel(), size)):
                piece = data[start : start + size].clone()
                writer.write(key, start, piece)
                piece.zero_()  # it was copied
    for base, target in files.items():
        assert target.read_bytes() == base.read_bytes()


def test_writer_gives_a_file_the_base_s_header_and_buffers_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    files = targets(checkpoint, tmp_path / "out")
    with ShardWriter(checkpoint, files):
        pass
    for base, target in files.items():
        found, expected = load_file(target), load_file(base)
        assert target.stat().st_size == base.stat().st_size
        assert {key: (t.shape, t.dtype) for key, t in found.items()} == {
            key: (t.shape, t.dtype) for key, t in expected.items()
        }
        for key, tensor in found.items():
            assert torch.equal(tensor, expected[key]) if key == BUFFER else not tensor.view(torch.uint8).any()


def test_writer_leaves_out_files_that_it_was_not_given(checkpoint: Checkpoint, tmp_path: Path) -> None:
    files = targets(checkpoint, tmp_path / "out")
    (base, target), *_ = files.items()
    with ShardWriter(checkpoint, {base: target}) as writer:
        for key in weight_keys(checkpoint):
            writer.write(key, 0, data_of(checkpoint, key))
    assert [file.name for file in (tmp_path / "out").iterdir()] == [target.name]
    assert target.read_bytes() == base.read_bytes()


def test_writer_replaces_no_file_and_follows_no_link(checkpoint: Checkpoint, tmp_path: Path) -> None:
    files = targets(checkpoint, tmp_path / "out")
    taken = list(files.values())[-1]
    (tmp_path / "precious").write_text("precious")
    taken.symlink_to(tmp_path / "precious")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileExistsError), ShardWriter(checkpoint, files):
        raise AssertionError("it was opened")
    assert (tmp_path / "precious").read_text() == "precious"
    assert len(os.listdir("/proc/self/fd")) == before


def test_writer_waits_at_its_end_and_raises_what_the_last_write_met(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.pwrite
    key = weight_keys(checkpoint)[-1]
    data = data_of(checkpoint, key)
    last = checkpoint.stored[key].offset + data.numel() - 8

    def refuse_last(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= last:
            time.sleep(0.05)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, data, offset)

    writer = ShardWriter(checkpoint, targets(checkpoint, tmp_path / "out"))
    with monkeypatch.context() as context, pytest.raises(OSError, match="No space left"), writer:  # noqa: PT012
        context.setattr(os, "pwrite", refuse_last)
        writer.write(key, 0, data[:-8])
        writer.write(key, data.numel() - 8, data[-8:])


@pytest.mark.parametrize("step", ["pwrite", "fsync"])
@pytest.mark.parametrize("sync", [1, 1 << 26])
def test_writer_raises_what_the_disk_says_at_the_latest_at_its_end(
    step: str, sync: int, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_SYNC", sync)
    original = getattr(os, step)
    keys = weight_keys(checkpoint)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(4):
        calls = 0

        def refuse_once(*arguments: Any, number: int = number) -> Any:
            nonlocal calls
            calls += 1
            if calls == number + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments)

        files = targets(checkpoint, tmp_path / str(number))
        if step == "fsync" and sync > 1 and number >= len(files):
            continue
        writer = ShardWriter(checkpoint, files)
        with monkeypatch.context() as context, pytest.raises(OSError, match="No space left"), writer:  # noqa: PT012
            context.setattr(os, step, refuse_once)
            for key in keys:
                writer.write(key, 0, data_of(checkpoint, key))
    assert len(os.listdir("/proc/self/fd")) == before


def test_writer_holds_few_pieces_while_the_disk_is_slow(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    original = os.pwrite
    held = most = 0
    lock = threading.Lock()

    def slow(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal held
        may_go_on.wait(10)
        with lock:
            held -= 1
        return original(descriptor, data, offset)

    key = max(weight_keys(checkpoint), key=lambda key: data_of(checkpoint, key).numel())
    data = data_of(checkpoint, key)
    with ShardWriter(checkpoint, targets(checkpoint, tmp_path / "out")) as writer, monkeypatch.context() as context:
        context.setattr(os, "pwrite", slow)
        timer = threading.Timer(0.3, may_go_on.set)
        timer.start()
        for start in range(0, 64 * 40, 64):
            with lock:
                held += 1
                most = max(most, held)
            writer.write(key, start, data[start : start + 64])
        timer.join()
        writer._wait(0)
    assert 1 < most <= output._WAITING + 2


def test_writer_refuses_a_base_that_becomes_shorter(checkpoint: Checkpoint, tmp_path: Path) -> None:
    files = targets(checkpoint, tmp_path / "out")
    for file in files:
        os.truncate(file, 100)
    with pytest.raises(DeltaError, match="became shorter while it was read"), ShardWriter(checkpoint, files):
        raise AssertionError("it was opened")


def test_check_room_adds_up_sizes_and_looks_at_the_disk_of_a_folder_to_come(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = list(checkpoint.folder.glob("*.safetensors"))
    needed = sum(file.stat().st_size for file in files)
    asked: list[Path] = []

    def usage(path: Path, free: int) -> Any:
        asked.append(Path(path))
        return SimpleNamespace(free=free)

    new = tmp_path / "new" / "deeper"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path, needed))
    check_room(new, files)
    assert asked == [tmp_path]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path, needed - 1))
    with pytest.raises(
        DeltaError, match=f"needs {needed:,} bytes of new weight files, and its disk has {needed - 1:,}"
    ):
        check_room(new, files)
    assert not (tmp_path / "new").exists()
