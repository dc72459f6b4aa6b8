"""The conditions under which runs were measured, and where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CONDITIONS = ("gpu", "processor", "cpu_count", "torch_threads", "python", "subnet_ft", "num_processes")


def differing_conditions(environments: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what times and peaks depend on and is not the same for all runs: their figures do not compare then.

    Args:
        environments: Run to its `environment`. Main memory and kernel may differ without making a run another one.

    Returns:
        Dotted key of device, threads or a version to the value of every run.
    """
    runs = {name: _conditions(environment) for name, environment in environments.items()}
    keys = dict.fromkeys(key for conditions in runs.values() for key in conditions)
    values = {key: {name: conditions.get(key) for name, conditions in runs.items()} for key in keys}
    return {key: by_run for key, by_run in values.items() if len(set(map(repr, by_run.values()))) > 1}


def _conditions(environment: Mapping[str, Any]) -> dict[str, Any]:
    versions = {f"packages.{name}": version for name, version in environment.get("packages", {}).items()}
    # Only several processes are recorded.
    recorded = {"num_processes": 1, **environment}
    return {**{key: recorded[key] for key in _CONDITIONS if key in recorded}, **versions}
