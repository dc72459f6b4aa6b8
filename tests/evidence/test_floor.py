"""The floor of two planted full runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.evidence.floor import Floor, floor
from subnet_ft.evidence.overlap import mask_overlap
from subnet_ft.evidence.plain import from_plain
from subnet_ft.masks import extract

NAME = "model.layers.0.mlp.up_proj.weight"


def planted(folder: Path, base: Path, rows: slice) -> Path:
    """A copy of the base with some rows of one matrix changed by a quarter of their value."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for path in base.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(base / "model.safetensors")
    weights[NAME][rows] = (weights[NAME][rows].float() * 1.25).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def records(*correct: bool) -> list[dict[str, bool]]:
    return [{"correct": entry} for entry in correct]


def test_floor_is_what_two_full_runs_do_not_share(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    save_tiny("llama", folder)
    base = open_checkpoint(folder)
    first, second = (
        open_checkpoint(planted(tmp_path / name, folder, rows))
        for name, rows in (("first", slice(0, 8)), ("second", slice(4, 8)))
    )
    overlap = mask_overlap(extract(base, first), extract(base, second), base=base)
    found = floor(
        base, first, second,
        seeds=(0, 1), overlap=overlap, records=records(True, False, True), second_records=records(True, True, True),
    )  # fmt: skip
    assert found.weights.in_mask_identical is not None
    assert found.weights.in_mask_identical["0"] == pytest.approx(0.5, abs=0.02)
    assert found.weights.relative_distance == pytest.approx(0.5**0.5, rel=0.15)
    assert found.overlap is not None
    assert found.overlap.overall.o2 == 1.0
    assert found.accuracy is not None
    assert found.accuracy.difference == pytest.approx(1 / 3)
    assert from_plain(Floor, asdict(found)).weights == found.weights


def test_floor_without_evaluation_has_no_accuracy(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    save_tiny("llama", folder)
    base = open_checkpoint(folder)
    run = open_checkpoint(planted(tmp_path / "run", folder, slice(0, 1)))
    found = floor(base, run, run, seeds=(0, 1), overlap=None, records=None, second_records=None)
    assert found.accuracy is None
    assert found.weights.relative_distance == 0.0
