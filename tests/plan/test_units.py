from __future__ import annotations

import pytest

from subnet_ft.errors import PlanError
from subnet_ft.plan.units import parse_memory, size_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GB", 24e9), ("24GiB", 24 * 2**30), ("80g", 80e9), ("1.5 TB", 1.5e12), ("512MiB", 2**29), ("7", 7)],
)
def test_parse_memory_reads_what_people_write(text: str, expected: float) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "24XB", "-3GB", "0GB", "24 GB RAM"])
def test_parse_memory_refuses_what_is_no_size_and_shows_how_to_write_one(text: str) -> None:
    with pytest.raises(PlanError, match="24GiB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (45.6e6, "45.6 MB"), (789e9, "789 GB"), (1.15e12, "1.15 TB")],
)
def test_size_text_has_three_digits(size: float, expected: str) -> None:
    assert size_text(size) == expected
