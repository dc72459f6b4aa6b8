"""The check for machines with a GPU: what of it runs without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gpu_cases import DEVICE

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "kernels" / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gpu_check_says_in_one_line_that_there_is_no_gpu() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "kernels"),
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
    }
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "There is no GPU here (torch.cuda.is_available() is False): nothing was checked."
    ]


def test_checks_find_every_op_right(script: ModuleType) -> None:
    found = list(script.checks(DEVICE, size=1500))
    assert [name for name, is_right in found if not is_right] == []
    assert len(found) == 4 * (3 * 8 + 6)


def test_checks_notice_a_wrong_op(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = script._run

    def wrong(op: str, *arguments: object, **options: object) -> object:
        result = right(op, *arguments, **options)
        return result + 1 if op == "gather" and isinstance(result, torch.Tensor) else result

    monkeypatch.setattr(script, "_run", wrong)
    failing = {name.split(",")[0] for name, is_right in script.checks(DEVICE, size=1500) if not is_right}
    assert failing == {"gather"}
