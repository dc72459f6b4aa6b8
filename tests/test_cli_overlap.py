"""`subnet-ft mask overlap`: its keys, its page, and one message for what it cannot compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.cli import main
from subnet_ft.masks import extract

SUFFIX = ".subnet.safetensors"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(save_tiny("llama", folder / "base")), str(save_tiny("llama", folder / "tuned", seed=1))


@pytest.fixture(scope="module")
def masks(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three masks of one pair, each part of the one before."""
    folder = tmp_path_factory.mktemp("masks")
    return [
        str(extract(*pair, criterion="absolute", tolerance=tolerance).save(folder / str(number) / f"mask{SUFFIX}"))
        for number, tolerance in enumerate((0.0, 0.02, 0.04))
    ]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["mask", "overlap", *arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["mask", "overlap", *arguments, "-q"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    return captured.err


def test_mask_overlap_prints_the_keys_that_scripts_rely_on(
    pair: tuple[str, str], masks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, *masks[:2], "--base", pair[0])
    assert {"o1", "o2", "jaccard", "uniform_o1", "uniform_o2", "magnitude_o1", "magnitude_o2", "version"} <= set(found)
    assert (found["first"], found["second"], found["o2"]) == ("0/mask", "1/mask", 1.0)
    assert found["magnitude_o2"] == pytest.approx(found["uniform_o2"], abs=0.05)
    without = run_json(capsys, *masks[:2])
    assert (without["o1"], without["magnitude_o1"]) == (found["o1"], None)


def test_mask_overlap_of_many_masks_compares_every_pair_and_writes_a_page(
    masks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, *masks, "-o", str(tmp_path / "page"))
    pairs = [(entry["first"], entry["second"]) for entry in found["pairs"]]
    assert pairs == [("0/mask", "1/mask"), ("0/mask", "2/mask"), ("1/mask", "2/mask")]
    assert json.loads((tmp_path / "page" / "overlap.json").read_text()) == found


def test_mask_overlap_says_how_to_get_the_magnitude_null(
    pair: tuple[str, str], masks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mask", "overlap", *masks[:2], "-o", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert f"add --base {pair[0]}" in captured.out
    assert str(tmp_path / "overlap.html") in captured.out
    assert "Comparing masks: 100%" in captured.err
    assert main(["mask", "overlap", "-q", *masks[:2], "--base", pair[0]]) == 0
    captured = capsys.readouterr()
    assert "add --base" not in captured.out
    assert captured.err == ""


def test_mask_overlap_refuses_what_it_cannot_compare(
    pair: tuple[str, str], masks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "are not those that the mask was made for" in refused(capsys, *masks, "--base", pair[1])
    assert "is listed twice" in refused(capsys, masks[0], masks[0])
    assert "needs two masks or more, got 1" in refused(capsys, masks[0])
    assert "There is no mask file" in refused(capsys, masks[0], str(tmp_path / f"no{SUFFIX}"))
    (tmp_path / "file").write_text("")
    assert "cannot be an output folder" in refused(capsys, *masks, "-o", str(tmp_path / "file" / "page"))
