"""The workflow of `.github/` and the versions in `requirements/` against the Makefile and pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
INSTALLED_BEFORE = {"torch"}
"""By scripts/install_torch.sh, from an index of its own."""


def required(extra: str | None = None) -> dict[str, Requirement]:
    """Return the requirements of the package, or of an extra with those that it includes."""
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras:
                found |= required(other)
        else:
            found[requirement.name] = requirement
    return found


def fixed(name: str) -> dict[str, Version]:
    """Read the versions that a file of `requirements/` fixes."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {package: Version(version) for package, version in pairs}


def lower_bound(requirement: Requirement) -> Version:
    """Return the version after `>=`."""
    (bound,) = [part.version for part in requirement.specifier if part.operator == ">="]
    return Version(bound)


def steps() -> list[dict[str, Any]]:
    return [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def test_lowest_is_the_lower_bounds_of_pyproject() -> None:
    bounds = {name: lower_bound(requirement) for name, requirement in {**required(), **required("test")}.items()}
    lowest = fixed("lowest")
    assert lowest == {name: bound for name, bound in bounds.items() if name not in INSTALLED_BEFORE}, (
        "requirements/lowest.txt must hold the lower bounds of pyproject.toml: change both, and run the tests with "
        "`make test VENV=.venv-lowest CONSTRAINTS=requirements/lowest.txt`"
    )


def test_current_lies_in_the_ranges_of_pyproject() -> None:
    ranges = {**required(), **required("test")}
    current = fixed("current")
    assert current.keys() == ranges.keys() - INSTALLED_BEFORE
    assert [name for name, version in current.items() if version not in ranges[name].specifier] == []


def test_workflow_only_calls_targets_of_the_makefile() -> None:
    commands = [step["run"] for step in steps() if "run" in step]
    assert commands
    for command in commands:
        words = re.fullmatch(r"make ([a-z-]+)(?: CONSTRAINTS=(\S+))?", command)
        assert words is not None, f"`{command}` is more than `make TARGET`: logic belongs into the Makefile"
        assert words[1] in TARGETS, f"`{command}`: the Makefile has no target `{words[1]}`"


def test_workflow_names_files_of_requirements_that_exist() -> None:
    rows = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert {row["versions"] for row in rows} == {path.stem for path in (ROOT / "requirements").glob("*.txt")}


def test_workflow_tests_the_lowest_torch_and_python_with_the_lowest_versions() -> None:
    (row,) = [row for row in WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["include"] if row["versions"] == "lowest"]
    assert Version(row["torch"]) == lower_bound(required()["torch"])
    assert f">={row['python']}" == PROJECT["requires-python"]


@pytest.mark.parametrize("job", WORKFLOW["jobs"])
def test_workflow_bounds_the_time_of(job: str) -> None:
    assert WORKFLOW["jobs"][job]["timeout-minutes"] <= 60


def test_workflow_runs_the_newest_versions_every_week() -> None:
    on = WORKFLOW[True]  # what YAML 1.1 makes of the key `on`
    assert [entry["cron"].split()[-1] for entry in on["schedule"]] == ["1"]
    assert "schedule" not in WORKFLOW["jobs"]["highest"]["if"]
    assert WORKFLOW["jobs"]["highest"]["steps"][-1]["env"] == {"TORCH_VERSION": "newest"}
