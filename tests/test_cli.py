"""The command line: exit codes, one message for bad input, JSON alone on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from subnet_ft.checkpoints.tiny import save_tiny
from subnet_ft.cli import main


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(save_tiny("llama", folder / "base")), str(save_tiny("llama", folder / "tuned", seed=1))


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main([*arguments, "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return code, json.loads(out)


def test_help_is_quick() -> None:
    command = [sys.executable, "-m", "subnet_ft", "--help"]
    subprocess.run(command, check=True, capture_output=True)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_extract_prints_the_keys_that_scripts_rely_on(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.subnet.safetensors"
    code, extracted = run_json(
        capsys, "extract", *pair, "-o", str(path), "--criterion", "absolute", "--tolerance", "0.1"
    )
    assert code == 0
    assert {"density", "num_trainable", "num_parameters", "density_by_tolerance", "tensors", "version"} <= set(
        extracted
    )
    assert extracted["density"] == extracted["num_trainable"] / extracted["num_parameters"]
    code, shown = run_json(capsys, "mask", "info", str(path))
    assert (code, shown) == (0, extracted)


def test_mask_info_reads_as_text(pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.subnet.safetensors"
    assert main(["extract", *pair, "-o", str(path), "-q"]) == 0
    assert main(["mask", "info", str(path)]) == 0
    text = capsys.readouterr().out
    assert "density by layer" in text
    assert "mlp.up_proj.weight" in text


def test_evaluate_prints_the_keys_that_scripts_rely_on(capsys: pytest.CaptureFixture[str]) -> None:
    code, figures = run_json(capsys, "evaluate", "tiny:llama", "tiny/grpo", "task.num_eval=20", "task.num_train=20")
    assert code == 0
    assert {"accuracy", "num_prompts", "ci_low", "ci_high", "version"} <= set(figures)
    assert 0 <= figures["ci_low"] <= figures["accuracy"] <= figures["ci_high"] <= 1
    assert figures["num_prompts"] == 20


def test_verify_exits_with_1_when_off_mask_weights_changed(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "m.subnet.safetensors")
    main(["extract", *pair, "-o", path, "--criterion", "absolute", "--tolerance", "0.1", "-q"])
    capsys.readouterr()
    base, tuned = pair
    code, figures = run_json(capsys, "verify", "--base", base, "--full", tuned, "--subnet", tuned, "--mask", path)
    assert code == 1
    assert figures["off_mask_changed"] > 0
    assert {"verdict", "in_mask_identical", "identical", "base_identical", "relative_distance"} <= set(figures)
    assert set(figures["identical"]) == {"0", "1e-06", "1e-05", "0.0001"}
    code, figures = run_json(capsys, "verify", "--base", base, "--full", tuned, "--subnet", base, "--mask", path)
    assert (code, figures["off_mask_changed"], figures["relative_distance"]) == (0, 0, 1.0)


@pytest.mark.parametrize("command", ["run", "train"])
def test_dry_run_checks_a_recipe_and_writes_nothing(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "tiny/grpo", f"output={tmp_path / 'run'}", "--dry-run"]) == 0
    assert "is fine" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tulu3_8b_dpo", "qwen2.5_7b_grpo_gsm8k", "qwen2.5_1.5b_grpo_gsm8k_24gb"])
def test_dry_run_passes_for_the_paper_recipes_without_a_network(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert main(["run", f"paper/{name}", "--dry-run"]) == 0


def test_a_recipe_with_three_mistakes_gets_one_message_naming_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["training.learning_rte=1e-5", "subnet.source.criterion=exactly", "evaluation.margin=4"]
    assert main(["run", "tiny/grpo", f"output={tmp_path / 'run'}", *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "has 3 problems" in captured.err
    for key in ("training.learning_rte", "subnet.source.criterion", "evaluation.margin"):
        assert key in captured.err
    assert "learning_rate" in captured.err
    assert "Traceback" not in captured.err


def test_wrong_input_exits_with_2_and_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mask", "info", str(tmp_path / "no.subnet.safetensors")]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_overrides_may_stand_behind_options(capsys: pytest.CaptureFixture[str]) -> None:
    code, checked = run_json(capsys, "run", "tiny/grpo", "seed=3", "--dry-run", "-q")
    assert (code, checked["recipe"]["seed"]) == (0, 3)
    assert main(["run", "tiny/grpo", "--dry-run", "--json", "seed=4", "-q", "output=elsewhere"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert (recipe["seed"], recipe["output"]) == (4, "elsewhere")


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["run", "tiny/grpo", "--dry-rum"], ["env", "seed=3"], ["run", "tiny/grpo", "--seed=3"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_recipes_lists_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    code, listed = run_json(capsys, "recipes")
    assert code == 0
    assert {"tiny/grpo", "tiny/dpo", "smollm2_135m/grpo_arithmetic", "smollm2_135m/dpo_arithmetic"} <= set(
        listed["recipes"]
    )


def test_env_names_versions_and_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    code, found = run_json(capsys, "env")
    assert code == 0
    assert found["packages"]["torch"] == torch.__version__
    assert found["cpu_count"] >= 1
