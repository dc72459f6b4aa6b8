"""The files for `accelerate launch`, and the cluster scripts that use them, are what the installed accelerate reads."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from subnet_ft.recipe import shipped_recipes

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
SLURM = ROOT / "examples" / "cluster" / "slurm.sbatch"
SKYPILOT = ROOT / "examples" / "cluster" / "skypilot.yaml"


def settled(file: Path, *options: str) -> Any:
    """Read a command line of `accelerate launch` with a file of ours, as accelerate does before it starts anything."""
    parser = launch_command_parser()
    arguments, _, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(file), *options, "-m", "subnet_ft", "run", "tiny/dpo"])
    )
    return arguments


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_launch_file_is_a_document(file: Path) -> None:
    head = file.read_text(encoding="utf-8").partition("\ncompute_environment:")[0]
    assert re.findall(r"^# (\w+): ", head, re.MULTILINE) == ["Shows", "Needs", "Launch", "Hardware", "Expected"]
    assert re.search(r"Not measured", head)
    (line,) = re.findall(r"^# Launch: +(.+)$", head, re.MULTILINE)
    assert line.startswith(f"accelerate launch --config_file recipes/accelerate/{file.name} ")
    assert " -m subnet_ft run " in line
    assert settled(file, *line.split(" -m subnet_ft")[0].split()[4:]).module


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_every_launch_file_without_casts(file: Path) -> None:
    load_config_from_file(str(file))  # raises on unknown keys
    arguments = settled(file, "--main_process_ip", "127.0.0.1")
    assert arguments.mixed_precision == "no"
    assert arguments.num_processes >= 2
    assert arguments.multi_gpu == (file.stem == "ddp")
    assert arguments.use_fsdp == (file.stem != "ddp")


@pytest.mark.parametrize("name", ["fsdp2", "multi_node"])
def test_sharded_launch_files_ask_for_fsdp2_with_whole_weights_in_every_process(name: str) -> None:
    file = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    arguments = settled(file, "--main_process_ip", "127.0.0.1", "--main_process_port", "0", "--machine_rank", "1")
    known = set(vars(launch_command_parser().parse_args(["x"])))
    assert set(yaml.safe_load(file.read_text())["fsdp_config"]) <= known, "a setting that accelerate would not pass on"
    variables = prepare_multi_gpu_env(arguments)
    assert variables["ACCELERATE_USE_FSDP"] == "true"
    assert variables["FSDP_VERSION"] == "2"
    assert variables["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert variables["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert variables["ACCELERATE_MIXED_PRECISION"] == "no"


def test_launch_files_are_no_recipes() -> None:
    assert FILES
    assert not [name for name, _ in shipped_recipes() if name.startswith("accelerate/")]


def cluster_commands() -> dict[str, str]:
    return {"slurm": SLURM.read_text(), "skypilot": yaml.safe_load(SKYPILOT.read_text())["run"]}


@pytest.mark.parametrize("name", ["slurm", "skypilot"])
def test_cluster_example_is_bash_with_options_that_accelerate_has(name: str) -> None:
    text = cluster_commands()[name]
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    launched = re.search(r"accelerate launch (.*?)-m subnet_ft", text, re.DOTALL)
    assert launched is not None
    options = set(re.findall(r"--\w+", launched[1]))
    assert {"--config_file", "--num_machines", "--num_processes", "--machine_rank", "--main_process_ip"} <= options
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    assert options <= known


@pytest.mark.parametrize("file", [SLURM, SKYPILOT], ids=lambda file: file.name)
def test_cluster_example_names_files_and_recipes_that_are_there(file: Path) -> None:
    text = file.read_text()
    named = set(re.findall(r"(?:recipes|examples)/[\w./-]+\.(?:yaml|sbatch)", text))
    assert "recipes/accelerate/multi_node.yaml" in named
    assert [name for name in named if not (ROOT / name).is_file()] == []
    recipes = {name for name, _ in shipped_recipes()}
    assert set(re.findall(r"RECIPE[:=] ?([\w./]+)", text)) <= recipes


def test_slurm_example_starts_one_launcher_per_machine(tmp_path: Path) -> None:
    """Stand-ins of Slurm's commands and of the launcher write down what they are given."""
    for name, body in {
        "scontrol": 'printf "node7\\nnode8\\n"',
        "srun": 'echo "srun $1"; shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": 'echo "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "12345",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    done = subprocess.run(
        ["bash", str(SLURM), "run", "tiny/dpo", "output=/a b"],
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    first, *launches = done.stdout.splitlines()
    assert first == "srun --kill-on-bad-exit=1"
    assert launches == [
        "launch --config_file recipes/accelerate/multi_node.yaml --num_machines 2 --num_processes 16 "
        f"--machine_rank {rank} --main_process_ip node7 --main_process_port 32345 -m subnet_ft run tiny/dpo output=/a b"
        for rank in (0, 1)
    ]
