"""Deltas on the Hub: what is uploaded in which order, the card, and what is refused, against a stand-in."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from delta_checkpoints import save_pair, unchanged
from hub_stand_in import REPO, Hub, stand_in
from report_evidence import full_report

from subnet_ft.cli import main
from subnet_ft.deltas import DeltaFile, export_delta
from subnet_ft.deltas.download import HUB_FILE
from subnet_ft.deltas.hub import model_card, pull_delta, push_delta
from subnet_ft.errors import DeltaError, DeltaFileError
from subnet_ft.evidence.report import write_report
from subnet_ft.masks import extract


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The stand-in, in place of the Hub's client."""
    return stand_in(tmp_path / "hub", monkeypatch)


@pytest.fixture
def delta(tmp_path: Path) -> DeltaFile:
    """A delta of a small pair."""
    base, tuned = save_pair(tmp_path / "pair", seed=1, density=0.3)
    return export_delta(base, tuned, tmp_path / "a.delta.safetensors")


def test_push_and_pull_give_the_same_file_and_a_card_with_the_report(
    hub: Hub, delta: DeltaFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = full_report()
    write_report(report, tmp_path / "run")
    assert main(["delta", "push", str(delta.path), REPO, "--report", str(tmp_path / "run"), "--private", "-q"]) == 0
    assert capsys.readouterr().out == f"https://hub/{REPO}\n"
    assert hub.asked == [f"create {REPO} private=True", HUB_FILE, "README.md"]
    card = (hub.folder / "README.md").read_text()
    assert delta.sha256 in card
    assert f"subnet-ft delta apply BASE hub:{REPO} -o FOLDER\n" in card
    assert f"Verdict: {report.verdict}. {report.verdict_reason}" in card
    assert all(f"Control {name}: {found.name}" in card for name, found in report.control_verdicts.items())
    pulled = tmp_path / "new" / "b.delta.safetensors"
    assert main(["delta", "pull", REPO, "-o", str(pulled), "-q"]) == 0
    assert delta.sha256 in capsys.readouterr().out
    assert pulled.read_bytes() == delta.path.read_bytes()
    assert [path.name for path in pulled.parent.iterdir()] == [pulled.name]


def test_the_card_names_a_base_of_the_hub_and_no_folder_of_ours(delta: DeltaFile) -> None:
    card = model_card(delta, REPO)
    assert delta.header.base_name not in card
    assert "No report came with this delta" in card
    assert "subnet-ft delta apply BASE" in card


def test_the_card_has_the_revision_in_the_command_that_applies(delta: DeltaFile) -> None:
    for name, revision, command in (
        ("someone/a-base", "v1", f"someone/a-base hub:{REPO} -o FOLDER --base-revision v1"),
        ("gpt2", "v 1", f"gpt2 hub:{REPO} -o FOLDER --base-revision 'v 1'"),
        ("runs/base", None, f"BASE hub:{REPO} -o FOLDER"),  # a folder where the delta was made
        ("../folder", "v1", f"BASE hub:{REPO} -o FOLDER"),
    ):
        delta.header = replace(delta.header, base_name=name, base_revision=revision)
        card = model_card(delta, REPO)
        assert f"\nsubnet-ft delta apply {command}\n" in card
        assert ("base_model: " in card) == (name in card) == ("BASE" not in command)


def test_a_damaged_download_leaves_what_was_there(hub: Hub, delta: DeltaFile, tmp_path: Path) -> None:
    content = bytearray(delta.path.read_bytes())
    content[-1] ^= 1
    (hub.folder / HUB_FILE).write_bytes(content)
    there = Path(shutil.copy(delta.path, tmp_path / "b.delta.safetensors"))
    with pytest.raises(DeltaFileError, match="damaged"):
        pull_delta(REPO, there)
    assert there.read_bytes() == delta.path.read_bytes()


def test_pull_to_a_full_disk_names_the_file_and_leaves_what_was_there(
    hub: Hub, delta: DeltaFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(delta.path, hub.folder / HUB_FILE)
    there = tmp_path / "b.delta.safetensors"
    there.write_text("there")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with unchanged(tmp_path), monkeypatch.context() as context:
            context.setattr(os, name, full)
            with pytest.raises(DeltaFileError, match="cannot be written: No space left on device"):
                pull_delta(REPO, there)


def test_a_delta_without_positions_and_a_missing_file_are_refused_before_anything_is_asked(
    hub: Hub, tmp_path: Path
) -> None:
    base, tuned = save_pair(tmp_path / "pair", seed=1, density=0.3)
    mask = extract(base, tuned)
    referring = export_delta(base, tuned, tmp_path / "r.delta.safetensors", mask=mask, mask_reference=True)
    with pytest.raises(DeltaError, match="has no positions of its own"):
        push_delta(referring.path, REPO)
    with pytest.raises(DeltaFileError, match="There is no delta file"):
        push_delta(tmp_path / "none.delta.safetensors", REPO)
    assert hub.asked == []


@pytest.mark.parametrize("command", ["push", "pull"])
def test_without_network_the_error_says_so(
    command: str, delta: DeltaFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    target = tmp_path / "b.delta.safetensors"
    arguments: dict[str, list[Any]] = {"push": [str(delta.path), REPO], "pull": [REPO, "-o", str(target)]}
    assert main(["delta", command, *arguments[command], "-q"]) == 2
    message = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set" in message
    assert f"`{REPO}`" in message
    assert "Traceback" not in message
    assert not target.exists()


@pytest.mark.parametrize("text", ["{}", "", "[1]", "[" * 100_000, "\udcff"])
def test_a_report_that_is_none_is_refused(
    text: str, hub: Hub, delta: DeltaFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_bytes(text.encode(errors="surrogateescape"))
    assert main(["delta", "push", str(delta.path), REPO, "--report", str(tmp_path), "-q"]) == 2
    assert "cannot be read as a report" in capsys.readouterr().err
    assert hub.asked == []
