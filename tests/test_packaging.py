"""What people install: the wheel, the sdist, and a wheel built from the sdist."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", "runs", ".*_cache")

pytestmark = pytest.mark.slow


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _wheel(source: Path, folder: Path) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    _run("-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(source), cwd=folder.parent)
    (wheel,) = folder.glob("subnet_ft-*.whl")
    return wheel


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return _wheel(tree, tree.parent / "wheel")


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    _run("-c", program, str(tree.parent / "sdist"), cwd=tree)
    (archive,) = (tree.parent / "sdist").glob("subnet_ft-*.tar.gz")
    return archive


def test_wheel_holds_every_file_of_the_sources_and_nothing_else(wheel: Path, tree: Path) -> None:
    """A folder without `__init__.py` would vanish from the wheel without a word; here it is named."""
    expected = {path.relative_to(tree / "kernels") for path in (tree / "kernels" / "subnet_kernels").rglob("*.*")}
    expected |= {path.relative_to(tree) for path in (tree / "subnet_ft").rglob("*.*")}
    expected |= {"subnet_ft" / path.relative_to(tree) for path in (tree / "recipes").rglob("*.*")}
    installed = {name for name in _names(wheel) if ".dist-info/" not in name}
    assert installed == {path.as_posix() for path in expected}
    assert {"subnet_ft/py.typed", "subnet_kernels/py.typed", "subnet_ft/cli/__init__.py"} <= installed
    assert any(name.startswith("subnet_ft/recipes/") and name.endswith(".yaml") for name in installed)
    assert {name.split("/")[0] for name in installed} == {"subnet_ft", "subnet_kernels"}


def test_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        about = [name for name in archive.namelist() if ".dist-info/" in name]
        read = {name.split("/", 1)[1]: archive.read(name).decode() for name in about}
    assert "License-Expression: Apache-2.0\n" in read["METADATA"]
    assert 'Requires-Dist: triton>=3.4; platform_system == "Linux"\n' in read["METADATA"]
    assert "subnet-ft = subnet_ft.cli:main" in read["entry_points.txt"]
    assert "Apache License" in read["licenses/LICENSE"]


def test_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert _names(_wheel(unpacked, tmp_path / "wheel")) == _names(wheel)


def test_installed_wheel_shows_the_shipped_recipes(wheel: Path, tmp_path: Path) -> None:
    """Unpacking a pure wheel is what an install does; -I and an own path keep the checkout out of sight."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import subnet_ft; from subnet_ft.recipe import shipped_recipes\n"
        "print(subnet_ft.__file__, *(name for name, _ in shipped_recipes()), sep='\\n')"
    )
    file, *recipes = _run("-I", "-c", program, str(tmp_path / "site"), cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert "smollm2_135m/grpo_arithmetic" in recipes
