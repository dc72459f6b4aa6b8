"""`apply_delta` and `export_delta` on checkpoints: the tuned files byte by byte, or an error and nothing written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from delta_checkpoints import DTYPES, contents, save_pair, unchanged, weights
from safetensors.torch import load_file, save_file

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.settled import JOURNAL
from subnet_ft.checkpoints.tiny import FAMILIES, save_tiny
from subnet_ft.deltas import Delta, apply_delta, export_delta, revert_delta, verify_delta
from subnet_ft.deltas import apply as apply_module
from subnet_ft.deltas import output as output_module
from subnet_ft.errors import DeltaError, DeltaFileError, DeltaMismatchError
from subnet_ft.training.saving import MANIFEST

SUFFIX = ".delta.safetensors"


def round_trip(folder: Path, family: str, *, density: float, seed: int, dtype: torch.dtype, shard: str) -> None:
    """Export, apply to a folder and in place, and revert; every byte of every file is compared."""
    base, tuned = save_pair(folder, family, density=density, seed=seed, dtype=dtype, shard=shard)
    delta = export_delta(base, tuned, folder / f"d{SUFFIX}", zstd=bool(seed % 2))
    assert contents(apply_delta(base, delta, folder / "out")) == contents(tuned)
    before = contents(base)
    apply_delta(base, delta, in_place=True)
    assert weights(base) == weights(tuned)
    revert_delta(base)
    assert contents(base) == before


@pytest.mark.parametrize("shard", ["10KB", "1GB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_apply_makes_the_tuned_files_of_every_family(family: str, shard: str, tmp_path: Path) -> None:
    round_trip(tmp_path, family, density=0.2, seed=len(family), dtype=torch.bfloat16, shard=shard)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_apply_makes_the_tuned_files_in_every_dtype(dtype: torch.dtype, density: float, tmp_path: Path) -> None:
    round_trip(tmp_path, "mixtral", density=density, seed=2, dtype=dtype, shard="20KB")


@pytest.mark.slow
def test_apply_makes_the_tuned_files_in_300_random_cases(tmp_path: Path) -> None:
    families = sorted(FAMILIES)
    for seed in range(300):
        settings = {"density": (0.001, 0.1, 0.5)[seed % 3], "dtype": DTYPES[seed // 3 % 3], "seed": seed}
        round_trip(tmp_path / str(seed), families[seed % len(families)], shard=("9KB", "1GB")[seed % 2], **settings)
        shutil.rmtree(tmp_path / str(seed))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Folders of a base and a tuned checkpoint, and their delta."""
    base, tuned = save_pair(tmp_path, shard="10KB")
    return base, tuned, export_delta(base, tuned, tmp_path / f"d{SUFFIX}").path


def test_apply_keeps_copies_of_tied_weights_and_buffers(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    for folder in (base, tuned):
        stored = load_file(folder / "model.safetensors")
        # transformers unties two stored weights that differ, as a NaN differs from itself.
        embedding = stored["model.embed_tokens.weight"].nan_to_num()
        stored |= {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
        stored["model.rotary_emb.inv_freq"] = torch.arange(3)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    delta = export_delta(base, tuned, tmp_path / f"d{SUFFIX}")
    assert "lm_head.weight" not in delta.entries
    assert weights(apply_delta(base, delta, tmp_path / "out")) == weights(tuned)


def test_apply_refuses_another_base_and_writes_nothing(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, tuned, delta = pair
    other = save_tiny("llama", tmp_path / "other", seed=5)
    before = {folder: contents(folder) for folder in (other, tuned)}
    for folder, message in ((other, "Apply it to that base"), (tuned, "it has been applied already")):
        with pytest.raises(DeltaMismatchError, match=message):
            apply_delta(folder, delta, tmp_path / "out")
        with pytest.raises(DeltaMismatchError, match=message):
            apply_delta(folder, delta, in_place=True)
        assert contents(folder) == before[folder]
    with pytest.raises(DeltaMismatchError, match="different parameters"):
        apply_delta(save_tiny("qwen2", tmp_path / "qwen2"), delta, tmp_path / "out")
    with pytest.raises(DeltaMismatchError, match=r"is bfloat16 in the delta and float32 in"):
        apply_delta(save_tiny("llama", tmp_path / "float", dtype=torch.float32), delta, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "other", "qwen2", "float", delta.name}


def test_apply_refuses_a_delta_that_does_not_give_its_result(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, path = pair
    delta = Delta.load(path)
    name = next(name for name, tensor in delta.tensors.items() if tensor.count)
    delta.tensors[name].values.view(torch.int16)[0] ^= 1
    with pytest.raises(DeltaError, match=f"does not give the result that it records for `{name}`"):
        apply_delta(base, delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert verify_delta(base, delta).wrong_result == [name]


def test_apply_refuses_a_damaged_file_and_writes_nothing(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, path = pair
    path.write_bytes(path.read_bytes()[:-1])
    before = contents(base)
    for settings in ({"output": tmp_path / "out"}, {"in_place": True}):
        with pytest.raises(DeltaFileError, match="truncated"):
            apply_delta(base, path, **settings)
    assert contents(base) == before
    assert not (tmp_path / "out").exists()


def test_apply_takes_a_chain_in_order_and_no_other(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path / "1", seed=1)
    third = save_pair(tmp_path / "2", seed=2)[1]
    one = export_delta(first, second, tmp_path / f"1{SUFFIX}")
    two = export_delta(second, third, tmp_path / f"2{SUFFIX}")
    assert weights(apply_delta(first, [one, two], tmp_path / "out")) == weights(third)
    with pytest.raises(DeltaMismatchError, match="delta 2 does not belong to the result of delta 1".capitalize()):
        apply_delta(first, [two, one], tmp_path / "wrong")
    before = contents(first)
    apply_delta(first, [one, two], in_place=True)
    assert weights(first) == weights(third)
    revert_delta(first)
    assert contents(first) == before
    with pytest.raises(DeltaError, match="No delta was given"):
        apply_delta(first, [], tmp_path / "wrong")


def test_apply_needs_one_place_that_is_new_and_has_room(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned, delta = pair
    for settings in ({}, {"output": tmp_path / "out", "in_place": True}):
        with pytest.raises(DeltaError, match="Say where the result goes"):
            apply_delta(base, delta, **settings)
    with pytest.raises(DeltaError, match="is already there"):
        apply_delta(base, delta, tuned)
    (tmp_path / "empty").mkdir()
    assert weights(apply_delta(base, delta, tmp_path / "empty")) == weights(tuned)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda folder: usage._replace(free=10))
    with pytest.raises(DeltaError, match="its disk has 10 free"):
        apply_delta(base, delta, tmp_path / "out")


def test_apply_copies_config_and_tokenizer_and_no_state_of_a_trainer(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, _, delta = pair
    state = {"trainer_state.json", MANIFEST, "optimizer.pt", "training_args.bin", "other.safetensors", JOURNAL}
    for name in state:
        (base / name).touch()
    (base / "LICENSE").write_text("free")
    out = apply_delta(base, delta, tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "tokenizer.json", "LICENSE", "model.safetensors.index.json"} <= names
    assert not names & state
    assert open_checkpoint(out).specs == open_checkpoint(base).specs


def test_apply_keeps_the_permissions_of_weight_files(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, delta = pair
    files = sorted(path.name for path in base.glob("*.safetensors"))
    modes = [0o600, 0o640, 0o664]
    for name, mode in zip(files, modes, strict=False):
        (base / name).chmod(mode)
    out = apply_delta(base, delta, tmp_path / "out")
    assert [(out / name).stat().st_mode for name in files] == [(base / name).stat().st_mode for name in files]


def test_apply_leaves_a_folder_alone_that_another_process_made_first(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, delta = pair
    out = tmp_path / "out"

    def made_meanwhile(*args: object) -> list[str]:
        out.mkdir(exist_ok=True)
        (out / "mine").touch()
        return []

    monkeypatch.setattr(apply_module, "side_files", made_meanwhile)
    with pytest.raises(DeltaError, match="out` is already there"):
        apply_delta(base, delta, out)
    assert {path.name for path in out.iterdir()} == {"mine"}
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", delta.name, "out"}


def test_apply_raises_what_the_disk_says_and_leaves_nothing(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, delta = pair

    def refuse(descriptor: int, data: object, offset: int) -> int:
        if offset > 2000:
            raise OSError(28, "No space left on device")
        return write(descriptor, data, offset)

    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", refuse)
    before = contents(base)
    for settings in ({"output": tmp_path / "out"}, {"in_place": True}):
        with pytest.raises(DeltaError, match="No space left"):
            apply_delta(base, delta, **settings)
    assert contents(base) == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", delta.name}


def test_apply_raises_what_the_disk_says_while_it_is_being_synced(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, delta = pair
    calls: list[int] = []

    def refuse_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:  # a second call says nothing of what the first one has reported
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(output_module, "_SYNC", 1)
    monkeypatch.setattr(os, "fsync", refuse_once)
    with pytest.raises(DeltaError, match=r"out` cannot be made: Input/output error"):
        apply_delta(base, delta, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", delta.name}


def test_apply_reads_linked_files_of_a_cache_and_writes_files_of_its_own(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, tuned, delta = pair
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(base.iterdir())):  # as the Hub's cache has them: links to blobs
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    with unchanged(base), unchanged(blobs):
        out = apply_delta(base, delta, tmp_path / "out")
        with pytest.raises(DeltaError, match="is a link"):
            apply_delta(base, delta, in_place=True)
    assert contents(out) == contents(tuned)
    assert not any(file.is_symlink() for file in out.iterdir())
