"""The command line: exit codes, one message for bad input, JSON alone on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from subnet_ft.checkpoints import open_checkpoint
from subnet_ft.checkpoints.models import save_with_reward_head
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


def test_evaluate_counts_pairs_for_a_reward_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_with_reward_head(open_checkpoint("tiny:llama").folder, tmp_path, dtype="bfloat16", seed=0)
    small = ["task.num_eval=30", "task.num_train=20", "task.pairs.num_prompts=20"]
    code, figures = run_json(capsys, "evaluate", str(tmp_path), "tiny/reward", *small)
    assert code == 0
    assert 3 < figures["num_pairs"] <= 30
    assert 0 <= figures["ci_low"] <= figures["accuracy"] <= figures["ci_high"] <= 1
    assert main(["evaluate", "tiny:llama", "tiny/reward", *small, "-q"]) == 2
    assert "no reward model" in capsys.readouterr().err


def test_evaluate_says_when_a_recipe_has_no_held_out_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "tiny:llama", "tiny/grpo", "evaluation.enabled=false"]) == 2
    assert "evaluation.enabled" in capsys.readouterr().err


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


def one_message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments, "-q"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("command", ["run", "train"])
def test_run_and_train_refuse_an_output_that_cannot_hold_a_run(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for output, reason in (
        (file, "is a file"),
        (file / "run", "is a file"),
        ("/proc/no", "`/proc` cannot be written to"),
    ):
        message = one_message(capsys, command, "tiny/grpo", f"output={output}")
        assert f"`{output}` cannot be an output folder" in message
        assert reason in message
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("output", [".", "/proc/x/m"])
def test_extract_refuses_an_output_before_it_reads_a_model(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = one_message(capsys, "extract", str(tmp_path / "no-base"), str(tmp_path / "no-tuned"), "-o", output)
    assert "no-base" not in message


def test_verify_refuses_an_output_before_it_reads_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [word for name in ("base", "full", "subnet", "mask") for word in (f"--{name}", str(tmp_path / "none"))]
    assert "output folder" in one_message(capsys, "verify", *models, "-o", "/proc/no")


def test_evaluate_refuses_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in one_message(capsys, "evaluate", str(tmp_path), "tiny/grpo")


def test_evaluate_needs_nothing_that_only_training_needs(capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe that was trained with other packages, or on another machine, can be judged on this one."""
    code, figures = run_json(
        capsys, "evaluate", "tiny:llama", "tiny/grpo", "task.num_eval=5", "task.num_train=5", "training.tf32=true",
        "training.use_vllm=true",
    )  # fmt: skip
    assert (code, figures["num_prompts"]) == (0, 5)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (PermissionError(13, "Permission denied", "/some/file"), "Permission denied: `/some/file`"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_an_error_of_the_system_is_one_message(
    error: OSError, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("subnet_ft.environment.environment", fail)
    assert one_message(capsys, "env") == f"{shown}\n"


def test_an_unexpected_error_shows_its_traceback_and_exits_with_3() -> None:
    program = (
        "import sys, subnet_ft.environment as e, subnet_ft.cli as c; e.environment = None; sys.exit(c.main(['env']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert "Unexpected error" in done.stderr
    assert "TypeError: 'NoneType' object is not callable" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "goes_on"),
    [(["run", "tiny/grpo"], True), (["train", "tiny/grpo"], True), (["env"], False), (["recipes"], False)],
)
def test_ctrl_c_promises_to_go_on_only_where_it_does(
    arguments: list[str], goes_on: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    for name in ("pipeline.load_checked_recipe", "environment.environment", "recipe.shipped_recipes"):
        monkeypatch.setattr(f"subnet_ft.{name}", interrupt)
    assert main(arguments) == 130
    message = capsys.readouterr().err
    assert "Interrupted." in message
    assert ("goes on from here" in message) is goes_on


@pytest.mark.parametrize("command", ["run", "train"])
def test_run_and_train_refuse_processes_without_a_launcher_and_several_gpus(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [command, "tiny/grpo", f"output={tmp_path / 'run'}"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE=2" in one_message(capsys, *arguments)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "CUDA_VISIBLE_DEVICES=0" in one_message(capsys, *arguments)
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--dry-run"]) == 0


def test_dry_run_lists_what_the_trainer_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for override, key in (
        ("training.num_generations=7", "training: GRPOConfig refuses"),
        ("training.report_to=no_such_tracker", "training.report_to: "),
        ("training={num_iterations: 2, save_steps: 3}", "training.save_steps: "),
    ):
        assert main(["run", "tiny/grpo", f"output={tmp_path / 'run'}", override, "--dry-run"]) == 2
        captured = capsys.readouterr()
        assert key in captured.err
        assert "Traceback" not in captured.err


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
