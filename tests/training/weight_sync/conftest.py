"""Two processes whose results several files look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from two_processes import results_of


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What either process of `group_worker.py` wrote."""
    return results_of(Path(__file__).with_name("group_worker.py"), tmp_path_factory.mktemp("group"))
