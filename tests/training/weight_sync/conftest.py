"""Two processes whose results several files look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import torchrun


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What either process of `group_worker.py` wrote."""
    folder = tmp_path_factory.mktemp("group")
    torchrun(Path(__file__).with_name("group_worker.py"), folder, processes=2)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in (0, 1)]
