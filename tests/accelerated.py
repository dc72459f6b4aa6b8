"""Starting the commands as users do: with `accelerate launch` and our files, on this machine's CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "recipes" / "accelerate"

TINY = (
    "tiny/dpo", "task.num_eval=20", "task.pairs.num_prompts=60", "training.per_device_train_batch_size=4",
    "training.max_steps=4", "training.save_steps=2", "subnet.source.tolerance=0.0002",
)  # fmt: skip
"""A recipe of seconds, whose full run leaves some weights alone."""


def start(
    *arguments: object,
    file: str = "ddp.yaml",
    options: Sequence[object] = ("--num_processes", 2),
    script: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start a launch, each process on one thread.

    Args:
        arguments: Of `subnet-ft`.
        file: In recipes/accelerate/.
        options: Of the launcher, behind its file.
        script: A file of the tests to run instead of the package.
        variables: Of the environment.
    """
    program = ["-m", "subnet_ft"] if script is None else [str(Path(__file__).with_name(script))]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(FILES / file), *map(str, options)]
    paths = os.pathsep.join(str(ROOT / part) for part in ("tests", ".", "kernels"))
    return subprocess.Popen(
        [sys.executable, *launcher, *program, *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **(variables or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(started: subprocess.Popen[str], *, timeout: float = 240) -> tuple[int, str, str]:
    """Wait for a launch, which counts as hanging after `timeout` seconds; returns code, stdout and stderr."""
    try:
        out, err = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for process in [*processes_of(started).values(), psutil.Process(started.pid)]:
            process.kill()
        out, err = started.communicate()
        raise AssertionError(f"the launch hangs:\n{err[-5000:]}") from None
    return started.returncode, out, err


def launch(*arguments: object, **how: object) -> tuple[int, str, str]:
    """Start a launch, and wait for it."""
    return end(start(*arguments, **how))  # type: ignore[arg-type]


def processes_of(started: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Return the processes of a launch by rank."""
    found = {}
    for child in psutil.Process(started.pid).children(recursive=True):
        try:
            rank = child.environ().get("RANK")
        except psutil.Error:
            continue
        if rank is not None:
            found[int(rank)] = child
    return found


def wait_for(path: Path, started: subprocess.Popen[str], *, timeout: float = 120) -> None:
    """Wait for a file that a process of a launch makes."""
    until = time.monotonic() + timeout
    while not path.exists():
        assert started.poll() is None, started.communicate()[1][-5000:]
        assert time.monotonic() < until, f"`{path}` does not appear"
        time.sleep(0.02)
