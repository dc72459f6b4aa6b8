"""The table of trainers and features: the results of one session, written to a page and read back from it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import pytest

BEGIN, END = "<!-- feature table: begin -->", "<!-- feature table: end -->"

Cells = Mapping[tuple[str, str], str]
"""Trainer and feature to outcome; the order of the keys is that of the rows, and within one that of the columns."""


class FeatureTable:
    """A pytest plugin: keeps the outcome of every test that records a cell, and writes the table at the end.

    Such a test records the property `cell` (row, trainer, column, feature, number of all cells) before anything can
    fail, and the property `outcome` after everything has passed. The property `corner` names the rows, if they are not
    trainers.

    Args:
        page: Gets the table between its two marks.
    """

    def __init__(self, page: Path) -> None:
        self.page = page
        self.outcomes: dict[tuple[int, str, int, str], str] = {}
        self.size = 0
        self.corner = "trainer"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep one phase of one test; reports of xdist's workers arrive here too, in any order."""
        recorded = dict(report.user_properties)
        if "cell" in recorded:
            row, trainer, column, feature, self.size = recorded["cell"]
            self.corner = recorded.get("corner", self.corner)
            key = row, trainer, column, feature
            passed = report.passed and "outcome" in recorded and self.outcomes.get(key) != "failed"
            self.outcomes[key] = recorded["outcome"] if passed else "failed"

    def pytest_sessionfinish(self) -> None:
        """Write the table, unless the session left out a cell."""
        try:
            if not self.outcomes or len(self.outcomes) != self.size:
                raise ValueError(f"the session ran {len(self.outcomes)} of {self.size} cells; select all of them.")
            cells = {(key[1], key[3]): self.outcomes[key] for key in sorted(self.outcomes)}
            write_table(self.page, cells, corner=self.corner)
        except (OSError, ValueError) as error:
            raise pytest.UsageError(f"--write-feature-table: {error}") from error


def write_table(page: Path, cells: Cells, *, corner: str = "trainer") -> None:
    """Put the table, with the versions that it holds for, between the two marks of a page.

    Raises:
        ValueError: The page lacks a mark.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"`{page}` must have the lines `{BEGIN}` and `{END}` once each.")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{head}{BEGIN}\n\n{_table(cells, corner)}\n\n{END}{tail}", encoding="utf-8")


def read_table(text: str) -> dict[tuple[str, str], str]:
    """Return the cells of a page that `write_table` wrote."""
    block = text.split(BEGIN)[1].split(END)[0]
    lines = [line for line in block.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], feature): word for row in rows[2:] for feature, word in zip(rows[0][1:], row[1:], strict=True)}


def _table(cells: Cells, corner: str) -> str:
    trainers, features = (list(dict.fromkeys(key[axis] for key in cells)) for axis in (0, 1))
    rows = [[corner, *features], ["---"] * (len(features) + 1)]
    rows += [[trainer, *(cells[trainer, feature] for feature in features)] for trainer in trainers]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    today = datetime.now(timezone.utc).date()
    return "\n".join([*lines, "", f"{len(cells)} tests on {today}, with {packages}."])
