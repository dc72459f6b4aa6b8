"""Where the conditions of runs differ."""

from __future__ import annotations

from subnet_ft.evidence.conditions import differing_conditions

HERE = {"processor": "a", "torch_threads": 2, "memory": 1, "packages": {"torch": "2.13", "trl": "1.16"}}


def test_differing_conditions_names_what_differs() -> None:
    there = {**HERE, "torch_threads": 1, "memory": 9, "packages": {"torch": "2.12", "trl": "1.16"}}
    found = differing_conditions({"full": HERE, "subnet": there, "control": HERE})
    assert found == {
        "torch_threads": {"full": 2, "subnet": 1, "control": 2},
        "packages.torch": {"full": "2.13", "subnet": "2.12", "control": "2.13"},
    }


def test_differing_conditions_of_like_runs_are_none() -> None:
    assert differing_conditions({"full": HERE, "subnet": {**HERE, "memory": 9}}) == {}
