"""A cached checkpoint appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from subnet_ft.checkpoints.cache import build_once, cache_folder


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBNET_FT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SUBNET_FT_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "subnet-ft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "subnet-ft"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUBNET_FT_CACHE", str(tmp_path))
    return tmp_path


def test_build_once_builds_once(cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "file").write_text("made")

    assert build_once("kind/name", build) == cache / "kind" / "name"
    assert build_once("kind/name", lambda _: pytest.fail("built again")) == cache / "kind" / "name"
    assert [path.name for path in (cache / "kind").iterdir()] == ["name"]


def test_build_once_leaves_nothing_of_a_failed_build(cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        build_once("name", build)
    assert list(cache.iterdir()) == []


def test_build_once_keeps_the_first_of_two_builds(cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "file").write_text("second")
        (cache / "name").mkdir()
        (cache / "name" / "file").write_text("first")

    assert (build_once("name", build) / "file").read_text() == "first"
    assert [path.name for path in cache.iterdir()] == ["name"]
