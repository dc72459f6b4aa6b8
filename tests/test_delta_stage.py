"""The delta beside a subnetwork run: made once, with its figures, never in the way of the run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_checkpoints import save_pair, unchanged, weights
from safetensors.torch import load_file, save_file

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.delta_stage import delta_path, with_delta
from subnet_ft.deltas import DeltaFile, apply_delta
from subnet_ft.errors import StageError
from subnet_ft.masks import SubnetMask, extract
from subnet_ft.stages import TrainedStage, read_json, write_json


def finished(run: Path) -> tuple[Path, TrainedStage]:
    """Lay out a run whose subnetwork stage was finished before there were deltas; returns its base and the stage."""
    base, tuned = save_pair(run.parent / "pair")
    run.mkdir()
    stage = tuned.rename(run / "subnet")
    results = {"sha256": "of the checkpoint"}
    write_json(stage / "stage.json", {"inputs": {"seed": 0}, "results": results, "finished": "then"})
    return base, TrainedStage(stage, extract(base, stage), results)


def mask_of(stage: TrainedStage) -> SubnetMask:
    assert stage.mask is not None
    return stage.mask


def recorded(stage: Path) -> dict[str, Any]:
    found = read_json(stage / "stage.json")
    assert found is not None
    return found


def test_with_delta_writes_a_patch_that_makes_the_checkpoint_and_notes_its_figures(tmp_path: Path) -> None:
    base, stage = finished(tmp_path / "run")
    before, files = recorded(stage.folder), weights(stage.folder)
    done = with_delta(stage, open_checkpoint(base))
    path = tmp_path / "run" / "subnet.delta.safetensors"
    assert delta_path(stage.folder) == path
    figures = done.results["delta"]
    assert figures == {
        "bytes": path.stat().st_size,
        "dense_bytes": (stage.folder / "model.safetensors").stat().st_size,
        "density": mask_of(stage).density,
        "sha256": DeltaFile(path).sha256,
    }
    assert recorded(stage.folder) == {**before, "results": {**before["results"], "delta": figures}}
    assert weights(stage.folder) == files, "what stands in the checkpoint's folder is loaded as weights"
    made = load_file(apply_delta(base, path, tmp_path / "made") / "model.safetensors")
    expected = load_file(stage.folder / "model.safetensors")
    assert all(torch.equal(made[name].view(torch.int16), expected[name].view(torch.int16)) for name in expected)


def test_with_delta_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, stage = finished(tmp_path / "run")
    done = with_delta(stage, open_checkpoint(base))
    monkeypatch.setattr("subnet_ft.delta_stage.export_delta", None)
    with unchanged(tmp_path / "run"):
        assert with_delta(done, open_checkpoint(base)) == done


@pytest.mark.parametrize("at", ["export_delta", "add_result"])
def test_with_delta_killed_at_any_moment_is_done_by_the_next_run(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, stage = finished(tmp_path / "run")

    def killed(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"subnet_ft.delta_stage.{at}", killed)
        with pytest.raises(KeyboardInterrupt):
            with_delta(stage, open_checkpoint(base))
    assert "delta" not in recorded(stage.folder)["results"]
    figures = with_delta(stage, open_checkpoint(base)).results["delta"]
    assert figures["sha256"] == DeltaFile(delta_path(stage.folder)).sha256
    assert recorded(stage.folder)["results"]["delta"] == figures


def test_with_delta_clears_what_a_killed_run_left_and_nothing_else(tmp_path: Path) -> None:
    base, stage = finished(tmp_path / "run")
    path = delta_path(stage.folder)
    code = """
import os, sys
from subnet_ft.deltas.writing import DeltaWriter
from subnet_ft.masks import ModelRecord
with DeltaWriter(sys.argv[1], ModelRecord("a base", None), {}):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    (left,) = (tmp_path / "run").glob(".*")
    other = tmp_path / "run" / f".other.{path.name}.x"
    other.mkdir()
    with_delta(stage, open_checkpoint(base))
    assert not left.exists()
    assert other.exists()
    assert path.exists()


def test_with_delta_makes_a_lost_one_again_and_refuses_another_one(tmp_path: Path) -> None:
    base, stage = finished(tmp_path / "run")
    done, path = with_delta(stage, open_checkpoint(base)), delta_path(stage.folder)
    whole = path.read_bytes()
    path.unlink()
    assert with_delta(done, open_checkpoint(base)) == done
    assert path.read_bytes() == whole
    for other in (whole[:-1], b"not a delta"):
        path.write_bytes(other)
        with unchanged(tmp_path / "run"), pytest.raises(StageError, match="not the delta that this run made"):
            with_delta(done, open_checkpoint(base))


@pytest.mark.parametrize("why", ["dtype", "outside the mask"])
def test_with_delta_says_why_there_can_be_none(why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, stage = finished(tmp_path / "run")
    file = stage.folder / "model.safetensors"
    stored = load_file(file)
    if why == "dtype":
        stored = {name: tensor.float() for name, tensor in stored.items()}
        said = "is bfloat16 in the base .* and float32 in .* A delta holds bits"
    else:
        name = next(iter(stored))
        stored[name].view(torch.int16).view(-1)[~mask_of(stage)[name].view(-1)] ^= 1
        said = f"weights of `{name}` changed outside the mask"
    save_file(stored, file, metadata={"format": "pt"})
    done = with_delta(stage, open_checkpoint(base))
    assert set(done.results["delta"]) == {"missing"}
    assert recorded(stage.folder)["results"] == done.results
    (message,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert message == f"subnet: no delta beside it: {done.results['delta']['missing']}"
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert re.search(said, message)
    assert with_delta(done, open_checkpoint(base)) == done
