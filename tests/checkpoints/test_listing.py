"""Names in messages."""

from __future__ import annotations

import pytest

from subnet_ft.checkpoints.listing import listing


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "none"),
        (["a"], "`a`"),
        (["a", "`b` in two shapes", "c"], "`a`, `b` in two shapes, `c`"),
        (["a", "b", "c", "d", "e"], "`a`, `b`, `c` and 2 more"),
    ],
)
def test_listing_shows_the_first_few(names: list[str], text: str) -> None:
    assert listing(names) == text
