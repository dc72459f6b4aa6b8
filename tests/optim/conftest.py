"""What several test files of this folder read: runs of 4, 2 and 1 processes, made once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import torchrun
from safetensors.torch import load_file


@dataclass(frozen=True)
class Runs:
    """What `processes_worker.py` left in a folder."""

    folder: Path

    def result(self, size: int, rank: int = 0) -> dict[str, Any]:
        """Return what a process of a run wrote down."""
        found: dict[str, Any] = json.loads((self.folder / f"result-{size}-{rank}.json").read_text())
        return found

    def tensors(self, kind: str, size: int, way: str, rank: int = 0) -> dict[str, torch.Tensor]:
        """Return the `weights` or the first `gradient` of a process."""
        name = way.replace(", ", "-").replace(" ", "_")
        return load_file(self.folder / f"{kind}-{size}-{name}-{rank}.safetensors")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The runs; what four processes saved is loaded by two and by one."""
    folder = tmp_path_factory.mktemp("processes")
    for size in (4, 2, 1):
        torchrun(Path(__file__).with_name("processes_worker.py"), folder, processes=size)
    return Runs(folder)
