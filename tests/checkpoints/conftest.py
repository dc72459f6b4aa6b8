"""What two test files of this folder read: checkpoints that two processes saved, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import torchrun


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `parts_worker.py` left them."""
    folder = tmp_path_factory.mktemp("saved")
    torchrun(Path(__file__).with_name("parts_worker.py"), folder, processes=2)
    return folder
