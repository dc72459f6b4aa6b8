"""`subnet-ft study`: what it prints, what `--json` holds, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_runs import SHORT

from subnet_ft.cli import main


def arguments(folder: Path, name: str = "causes", *words: str) -> list[str]:
    return ["study", name, "tiny/grpo", *SHORT, f"output={folder}", *words, "-q"]


def test_study_command_runs_and_prints_the_keys_that_scripts_rely_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, "which-mask", "--only", "final,uniform_0.01", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["study"] == "which_mask"
    assert [cell["name"] for cell in printed["cells"]] == ["as_written", "final", "uniform_0.01"]
    assert {"density", "accuracy", "ci_low", "difference", "verdict", "recall", "precision", "failure"} <= set(
        printed["cells"][1]
    )
    folder = tmp_path / "studies" / "which_mask"
    assert printed["output"] == str(folder)
    assert {path.name for path in folder.glob("study.*")} == {"study.html", "study.md", "study.json"}
    assert main(arguments(tmp_path, "which_mask", "--only", "final,uniform_0.01")) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Which masks recover the full run")
    assert "study.html" in shown


def test_study_command_dry_run_lists_cells_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "run", "causes", "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "study causes: 17 cells, 134 steps" in shown
    assert "  kl_on: KL on, 8 steps" in shown
    assert "Time: known after the first cell." in shown
    assert main(arguments(tmp_path / "run", "causes", "--dry-run", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["num_steps"], printed["step_seconds"], len(printed["cells"])) == (134, None, 17)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("sparcity", [], "did you mean `sparsity`?"),
        ("causes", ["--only", "kl_of"], "`kl_of` is no cell of the study `causes`; did you mean `kl_on`"),
        ("causes", ["--only", "kl_on,kl_on"], "`kl_on` is listed twice"),
        ("early_mask", ["training.max_steps=-1"], "set `training.max_steps`, got -1"),
        ("causes", ["training.beta=high"], "training.beta"),
    ],
)
def test_study_command_refuses_before_anything_is_made(
    name: str, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments(tmp_path / "run", name, *words))
    except SystemExit as stopped:  # argparse's own refusals
        code = stopped.code  # type: ignore[assignment]
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
