"""The table of `docs/trainers.md` shows what the tests of one session did, and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from feature_table import BEGIN, END, FeatureTable, read_table


def page_in(folder: Path) -> Path:
    page = folder / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return page


def report(row: int, column: int, *, passed: bool = True, outcome: str | None = "yes", size: int = 4) -> Any:
    properties: list[tuple[str, Any]] = [("cell", [row, "AB"[row], column, "xy"[column], size])]
    return SimpleNamespace(passed=passed, user_properties=properties + ([("outcome", outcome)] if outcome else []))


def test_feature_table_writes_what_the_tests_did_in_the_order_of_the_table(tmp_path: Path) -> None:
    page = page_in(tmp_path)
    table = FeatureTable(page)
    table.pytest_runtest_logreport(SimpleNamespace(passed=True, user_properties=[]))  # a test of something else
    for cell in (
        report(1, 1, outcome="refused: it cannot"),
        report(1, 0, passed=False, outcome=None),
        report(0, 1, passed=False),  # failed after its last assertion
        report(0, 1),  # its teardown passes
        report(0, 0),
    ):
        table.pytest_runtest_logreport(cell)
    table.pytest_sessionfinish()
    text = page.read_text()
    assert list(read_table(text).items()) == [
        (("A", "x"), "yes"),
        (("A", "y"), "failed"),
        (("B", "x"), "failed"),
        (("B", "y"), "refused: it cannot"),
    ]
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


def test_feature_table_names_its_rows(tmp_path: Path) -> None:
    page = page_in(tmp_path)
    table = FeatureTable(page)
    one = report(0, 0, size=1)
    one.user_properties.append(("corner", "algorithm"))
    table.pytest_runtest_logreport(one)
    table.pytest_sessionfinish()
    assert "| algorithm | x |" in page.read_text()


@pytest.mark.parametrize("count", [0, 3])
def test_feature_table_refuses_a_part_of_the_table(count: int, tmp_path: Path) -> None:
    page = page_in(tmp_path)
    before = page.read_text()
    table = FeatureTable(page)
    for index in range(count):
        table.pytest_runtest_logreport(report(index // 2, index % 2))
    with pytest.raises(pytest.UsageError, match=f"ran {count} of"):
        table.pytest_sessionfinish()
    assert page.read_text() == before


def test_feature_table_refuses_a_page_without_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text")
    table = FeatureTable(page)
    table.pytest_runtest_logreport(report(0, 0, size=1))
    with pytest.raises(pytest.UsageError, match="feature table: begin"):
        table.pytest_sessionfinish()
