"""Every test runs offline, on one thread, from one seed, and away from the user's caches."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from feature_table import FeatureTable

# Read when transformers, datasets and tokenizers are first imported, so set before any test file is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads this when it is first imported, by whomever. Without a GPU its kernels run in the interpreter.
if not any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests, with the reason, where there is no GPU."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch.cuda.is_available() is False"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-feature-table",
        metavar="PAGE",
        type=Path,
        help="write the results of this session's cells (trainer x feature) between the marks of this page",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect the table where all reports arrive: under xdist not in the workers."""
    page = config.getoption("--write-feature-table")
    if page and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FeatureTable(page), "feature-table")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep converted checkpoints of this session in its own folder; subprocesses inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBNET_FT_CACHE", str(tmp_path_factory.mktemp("subnet-ft-cache")))
        yield


@pytest.fixture(scope="session")
def _frozen() -> Iterator[set[str]]:
    """Return a set for the names of modules whose objects are out of reach of `gc.collect`, until the session ends."""
    yield set()
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _quick_collections(_frozen: set[str]) -> None:
    """Keep what is imported out of the collections that every training run makes several times: 0.2 s each.

    What a test makes is collected as ever.
    """
    if imported := sys.modules.keys() - _frozen:
        gc.collect()
        gc.freeze()
        _frozen |= imported


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Give every test the same seed and one thread, so that its bits do not depend on the tests before it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)
