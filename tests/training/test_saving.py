"""Checkpoints are whole or not there: publishing, removing, rotating, and errors in the middle of saving."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import FIRST_IS_BEST, SAVES, damaged, plain, restricted
from training.masked_runs import same_state, same_weights, state_of, weights_of
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from subnet_ft.optim.frozen import weights_digest
from subnet_ft.training import checkpoint_mixin, saving
from subnet_ft.training.resume import newest_complete, read_manifest
from subnet_ft.training.saving import MANIFEST, clear_staging, publish, remove, rotate, staging_folder

FACTS: dict[str, Any] = {
    "global_step": 2, "num_processes": 1, "mask_fingerprint": "ab", "base_fingerprints": {}, "weights": "cd",
}  # fmt: skip
FILES = {"optimizer.pt": b"12", "scheduler.pt": b"", "trainer_state.json": b"{}", "part/weights": b"123456"}


def write(run_folder: Path, step: int, *, old: bool = False) -> Path:
    """Write what a trainer leaves in the staging folder, all but the manifest."""
    written = staging_folder(run_folder) / f"checkpoint-{step}"
    for name, content in FILES.items():
        (written / name).parent.mkdir(parents=True, exist_ok=True)
        (written / name).write_bytes(content + (b"old" if old else b""))
    return written


def _fail(*args: Any, **kwargs: Any) -> None:
    raise OSError("no space left on device")


def listed(run_folder: Path) -> list[str]:
    return sorted(path.name for path in run_folder.iterdir() if path.name.startswith("checkpoint"))


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {str(p.relative_to(checkpoint)): p.read_bytes() for p in sorted(checkpoint.rglob("*")) if p.is_file()}


def test_publish_moves_a_checkpoint_into_place_and_lists_its_files(tmp_path: Path) -> None:
    written, checkpoint = write(tmp_path, 2), tmp_path / "checkpoint-2"
    assert newest_complete(tmp_path) is None
    assert get_last_checkpoint(str(tmp_path)) is None
    publish(written, checkpoint, FACTS)
    assert not written.exists()
    assert {name: content for name, content in contents(checkpoint).items() if name != MANIFEST} == FILES
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert manifest["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert {key: manifest[key] for key in FACTS} == FACTS
    assert newest_complete(tmp_path) == checkpoint
    assert read_manifest(checkpoint) == manifest
    assert get_last_checkpoint(str(tmp_path)) == str(checkpoint)


def test_publish_replaces_an_older_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    publish(write(tmp_path, 2, old=True), checkpoint, FACTS)
    (checkpoint / "stray").touch()
    publish(write(tmp_path, 2), checkpoint, FACTS)
    assert contents(checkpoint).keys() == {*FILES, MANIFEST}
    assert (checkpoint / "optimizer.pt").read_bytes() == FILES["optimizer.pt"]
    assert listed(tmp_path) == ["checkpoint-2"]
    assert list(staging_folder(tmp_path).iterdir()) == []


def test_publish_syncs_every_file_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, checkpoint = write(tmp_path, 2), tmp_path / "checkpoint-2"
    synced: list[Path] = []
    replace, sync = os.replace, saving._sync
    monkeypatch.setattr(saving, "_sync", lambda path: (synced.append(path), sync(path)))

    def moved(source: Path, target: Path) -> None:
        assert {*written.rglob("*"), written} <= set(synced)
        assert (written / MANIFEST).is_file()
        replace(source, target)

    monkeypatch.setattr(os, "replace", moved)
    publish(written, checkpoint, FACTS)
    assert synced[-1] == tmp_path  # the folder that got the name


def _fails_at(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """Return a form of a function that fails at its `call`-th call alone."""
    calls = itertools.count(1)
    return lambda *args, **kwargs: (_fail if next(calls) == call else function)(*args, **kwargs)


@pytest.mark.parametrize(
    ("owner", "broken", "call"),
    [(saving, "_sync", 1), (saving, "_set_aside", 1), (os, "replace", 1), (os, "replace", 2)],
)
def test_publish_that_fails_leaves_the_older_checkpoint(
    owner: Any, broken: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    publish(write(tmp_path, 2, old=True), checkpoint, FACTS)
    before = contents(checkpoint)
    written = write(tmp_path, 2)
    monkeypatch.setattr(owner, broken, _fails_at(getattr(owner, broken), call))
    with pytest.raises(OSError, match="no space left"):
        publish(written, checkpoint, FACTS)
    assert contents(checkpoint) == before
    assert newest_complete(tmp_path) == checkpoint


def test_what_was_not_moved_out_of_the_staging_folder_is_never_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _fail)
        with pytest.raises(OSError, match="no space left"):
            publish(written, tmp_path / "checkpoint-2", FACTS)
    assert read_manifest(written)["global_step"] == 2  # whole, and yet nobody may take it for a checkpoint of the run
    assert newest_complete(tmp_path) is None
    assert get_last_checkpoint(str(tmp_path)) is None
    rotate(tmp_path, newest=tmp_path / "checkpoint-1", limit=1, best=None)
    assert written.is_dir()
    clear_staging(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_remove_that_is_broken_off_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        publish(write(tmp_path, step), tmp_path / f"checkpoint-{step}", FACTS)
    delete = shutil.rmtree

    def half(path: Path, **options: Any) -> None:
        if options:  # what it clears first
            delete(path, **options)
            return
        (path / "optimizer.pt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            remove(tmp_path / "checkpoint-2")
    assert listed(tmp_path) == ["checkpoint-1"]
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-1"
    publish(write(tmp_path, 2), tmp_path / "checkpoint-2", FACTS)
    remove(tmp_path / "checkpoint-2")  # what the first attempt left does not stand in the way
    clear_staging(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("limit", [None, 0, 1, 2, 3, 9])
@pytest.mark.parametrize("best", [None, 1, 3, 12, 77])
@pytest.mark.parametrize("newest", [None, 2])
def test_rotate_keeps_what_transformers_keeps(
    tmp_path: Path, limit: int | None, best: int | None, newest: int | None
) -> None:
    """`newest` was written last, as by a run that was resumed from an earlier step."""
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    for folder in folders:
        for number, step in enumerate((1, 2, 3, 12)):
            checkpoint = folder / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            os.utime(checkpoint, (number * 10.0, 999.0 if step == newest else number * 10.0))
    ours, theirs = folders
    last = ours / f"checkpoint-{newest or 12}"
    rotate(ours, newest=last, limit=limit, best=None if best is None else str(ours / f"checkpoint-{best}"))
    rotate_checkpoints(
        output_dir=str(theirs), save_total_limit=limit, use_mtime=True,
        best_model_checkpoint=None if best is None else str(theirs / f"checkpoint-{best}"),
    )  # fmt: skip
    assert listed(ours) == listed(theirs)


@pytest.mark.parametrize(
    ("max_bytes", "limit", "best", "left"),
    [
        (40, None, None, [1, 2, 3, 4]),
        (39, None, None, [2, 3, 4]),
        (20, None, None, [3, 4]),
        (20, None, 1, [1, 4]),
        (1, None, None, [4]),
        (1, None, 2, [2, 4]),
        (40, 2, None, [3, 4]),
        (20, 3, None, [3, 4]),
    ],
)
def test_rotate_keeps_what_fits_the_newest_and_the_best(
    tmp_path: Path, max_bytes: int, limit: int | None, best: int | None, left: list[int]
) -> None:
    for step in (1, 2, 3, 4):
        checkpoint = tmp_path / f"checkpoint-{step}"
        (checkpoint / "part").mkdir(parents=True)
        (checkpoint / "part" / "weights").write_bytes(b"1234567")
        (checkpoint / "optimizer.pt").write_bytes(b"123")
        os.utime(checkpoint, (step * 10.0, step * 10.0))
    best_path = None if best is None else str(tmp_path / f"checkpoint-{best}")
    rotate(tmp_path, newest=tmp_path / "checkpoint-4", limit=limit, best=best_path, max_bytes=max_bytes)
    assert listed(tmp_path) == [f"checkpoint-{step}" for step in left]


@pytest.mark.parametrize("bound", [{"save_total_limit": 1}, {"subnet": {"save_total_bytes": 1}}])
def test_a_checkpoint_that_somebody_touched_does_not_take_the_place_of_the_one_just_written(
    bound: dict[str, Any], tmp_path: Path
) -> None:
    trainer = restricted(tmp_path, max_steps=2, **SAVES)
    trainer.train()
    damaged(tmp_path / "checkpoint-1" / "optimizer.pt")
    os.utime(tmp_path / "checkpoint-1", (4e9, 4e9))
    again = restricted(tmp_path, max_steps=3, **SAVES, **bound)
    again.train(resume_from_checkpoint=True)
    assert listed(tmp_path) == ["checkpoint-3"]
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-3"


def test_rotate_knows_the_best_checkpoint_by_another_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (step * 10.0, step * 10.0))
    monkeypatch.chdir(tmp_path.parent)
    relative = Path(tmp_path.name, "checkpoint-1")
    rotate(tmp_path, newest=tmp_path / "checkpoint-3", limit=1, best=str(relative))
    assert listed(tmp_path) == ["checkpoint-1", "checkpoint-3"]


def test_save_total_bytes_leaves_the_newest(tmp_path: Path) -> None:
    restricted(tmp_path, subnet={"save_total_bytes": 1}, **SAVES).train()
    assert listed(tmp_path) == ["checkpoint-4"]


def test_a_trainer_publishes_checkpoints_that_transformers_finds(tmp_path: Path) -> None:
    trainer = restricted(tmp_path, max_steps=3, **SAVES)
    trainer.train()
    assert listed(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert not staging_folder(tmp_path).exists()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3") == str(newest_complete(tmp_path))
    for step in (1, 2, 3):
        manifest = read_manifest(tmp_path / f"checkpoint-{step}")
        assert manifest["global_step"] == step
        assert manifest["mask_fingerprint"] == trainer.subnet_mask.fingerprint
        assert manifest["base_fingerprints"] == trainer.masked_optimizer.frozen_fingerprints
        assert manifest["num_processes"] == 1
        assert manifest["files"].keys() == contents(tmp_path / f"checkpoint-{step}").keys() - {MANIFEST}
        saved = type(trainer.model).from_pretrained(tmp_path / f"checkpoint-{step}")
        assert manifest["weights"] == weights_digest(saved)
    assert manifest["weights"] == weights_digest(trainer.model)
    # The files are those of a plain trainer, under the very names.
    other = plain(tmp_path / "plain", max_steps=1, **SAVES)
    other.train()
    assert contents(tmp_path / "plain/checkpoint-1").keys() == manifest["files"].keys() - {"subnet_start_0.pt"}


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_best_checkpoint_is_kept_named_and_loaded(tmp_path: Path, limit: int) -> None:
    trainer = restricted(tmp_path / "ours", save_total_limit=limit, **FIRST_IS_BEST)
    first: dict[str, torch.Tensor] = {}
    publishing = trainer._save_checkpoint

    def note(*args: Any) -> None:
        publishing(*args)
        first.update({} if first else weights_of(trainer.model))

    trainer._save_checkpoint = note
    trainer.train()
    best = tmp_path / "ours" / "checkpoint-1"
    other = plain(tmp_path / "theirs", save_total_limit=limit, **FIRST_IS_BEST)
    other.train()
    assert listed(tmp_path / "ours") == listed(tmp_path / "theirs")
    assert trainer.state.best_model_checkpoint == str(best)
    for checkpoint in (tmp_path / "ours").glob("checkpoint-*"):
        assert json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
        read_manifest(checkpoint)  # whole, though its state was written twice
    same_weights(weights_of(trainer.model), first)


@pytest.mark.parametrize("place", ["save_model", "_save_rng_state", "save_rollouts", "save_extras", "publish"])
def test_an_error_while_saving_leaves_earlier_checkpoints_and_a_trainer_that_goes_on(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = restricted(tmp_path / "straight")
    straight.train()
    trainer = restricted(tmp_path / "run", **FIRST_IS_BEST | {"load_best_model_at_end": False})
    owner = trainer if hasattr(trainer, place) else checkpoint_mixin
    working = getattr(owner, place)

    def fails_at_3(*args: Any, **kwargs: Any) -> Any:
        return (_fail if trainer.state.global_step == 3 else working)(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, fails_at_3)
        with pytest.raises(OSError, match="no space left"):
            trainer.train()
    assert listed(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]
    assert newest_complete(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    assert trainer._get_output_dir(None) == str(tmp_path / "run")
    trainer.train(resume_from_checkpoint=True)
    same_weights(weights_of(trainer.model), weights_of(straight.model))
    same_state(state_of(trainer), state_of(straight))
    assert listed(tmp_path / "run") == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-1")
    assert not staging_folder(tmp_path / "run").exists()


class Hub:
    """Remembers what is pushed, and what was in the folder then."""

    def __init__(self) -> None:
        self.pushed: list[tuple[str, str, set[str]]] = []

    def upload_folder(self, *, folder_path: str, path_in_repo: str = "", **options: Any) -> Any:
        self.pushed.append((folder_path, path_in_repo, set(contents(Path(folder_path)))))
        return self

    def is_done(self) -> bool:
        return True

    done = is_done


def test_push_to_hub_pushes_checkpoints_from_where_they_end_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trainer = restricted(tmp_path, max_steps=2, save_total_limit=1, **SAVES)
    trainer.args.push_to_hub = True
    trainer.args.hub_strategy = "all_checkpoints"
    trainer.hub_model_id = "nobody/nothing"
    trainer.push_in_progress = None
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    trainer.train()
    runs, checkpoints = hub.pushed[::2], hub.pushed[1::2]
    assert [push[:2] for push in runs] == [(str(tmp_path), "")] * 2
    assert [push[:2] for push in checkpoints] == [
        (str(tmp_path / f"checkpoint-{step}"), f"checkpoint-{step}") for step in (1, 2)
    ]
    for _, _, names in checkpoints:
        assert {MANIFEST, "model.safetensors", "optimizer.pt", "trainer_state.json"} <= names
    for _, _, names in runs:
        assert "model.safetensors" in names
        assert not any(name.startswith(saving.STAGING) for name in names)
