"""`subnet-ft plan`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from subnet_ft import __version__
from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.cli import main


def test_plan_prints_a_plan_and_loads_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    assert main(["plan", "tiny/grpo", f"model.name={folder}", "--memory", "24GB"]) == 0
    printed = capsys.readouterr().out
    assert "subnetwork, density 0.2, one process:" in printed
    assert "21,248 weights" in " ".join(printed.split())


def test_plan_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpus", "4", "--method", "subnet", "--sharding", "ddp", "fsdp2", "--density", "0.1", "--json"]
    assert main(["plan", "tiny/dpo", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == __version__
    assert [(row["method"], row["sharding"]) for row in found["rows"]] == [("subnet", "ddp"), ("subnet", "fsdp2")]


def test_plan_is_fine_when_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny/grpo", "--memory", "1MB", "--method", "full"]) == 0
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["full", "subnet"], ["full,subnet"]])
def test_plan_takes_overrides_wherever_they_stand(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "tiny/grpo", "--json", "--method", *words, "training.per_device_train_batch_size=16"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"]["sequences"] == 16
    assert {row["method"] for row in found["rows"]} >= {"full", "subnet"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny/grpo", "--gpus", "0"], "--gpus must be at least 1"),
        (["tiny/grpo", "--memory", "lots"], "Write it with its unit"),
        (["tiny/grpo", "--method", "lorra"], "`lorra` is no method"),
        (["tiny/grpo", "--sharding", "zero3"], "choose among none, ddp"),
        (["tiny/nothing"], "no such file"),
        ([], "Name a recipe"),
        (["tiny/grpo", "--sizes"], "Leave out the recipe"),
        (["tiny/grpo", "--mask", "nothing.safetensors"], "no mask file"),
    ],
)
def test_plan_refuses_with_the_next_step(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
