"""When compiled code on disk still holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import subnet_kernels

jit = pytest.importorskip("subnet_kernels.cpu.jit", reason="needs numba")
PACKAGE = Path(subnet_kernels.__file__).parent


def test_compiled_code_is_bound_to_every_file_of_the_package() -> None:
    assert jit.digest_of_sources(PACKAGE) == jit._SOURCES
    dispatcher = jit.compiled(jit.digest_of_sources)  # not called, so nothing is compiled
    assert jit._SOURCES in dispatcher._cache._cache_file._source_stamp


@pytest.mark.parametrize(
    ("file", "constant"),
    [
        ("reference/fingerprint.py", "SEEDS"),
        ("reference/splitmix.py", "MULTIPLIERS"),
        ("layout.py", "TILE_SIZE"),
        ("cpu/moves.py", "MAX_BLOCK"),
    ],
)
def test_digest_of_sources_changes_with_a_constant_that_compiled_code_freezes(
    file: str, constant: str, tmp_path: Path
) -> None:
    copy = tmp_path / "subnet_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert jit.digest_of_sources(copy) == jit._SOURCES
    text = (copy / file).read_text()
    assert f"\n{constant} = " in text
    (copy / file).write_text(text.replace(f"\n{constant} = ", f"\n{constant} = 2 * "))
    assert jit.digest_of_sources(copy) != jit._SOURCES
