"""Pages say what is: no number or name that somebody meant to fill in is left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
ACRONYMS = {"PRIME"}
"""Words of five capitals or more that are names."""


def placeholders(text: str) -> list[str]:
    """Return the words in capitals that stand in the text outside code: with an underscore, or of five letters."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", prose)
    found = re.findall(r"(?<![\w$])(?:[A-Z]{5,}|[A-Z]+(?:_[A-Z]+)+|TODO|TBD|XXX)(?!\w)", prose)
    return [word for word in found if word not in ACRONYMS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_no_placeholder_left(page: Path) -> None:
    assert placeholders(page.read_text(encoding="utf-8")) == []


def test_placeholders_are_found_in_prose_and_not_in_code() -> None:
    text = "One audit takes AUDIT_MS, all OVERHEAD. See `SUBNET_FT_CACHE`, [X](LARGE_NAME.md), GRPO."
    assert placeholders(text) == ["AUDIT_MS", "OVERHEAD"]
    assert placeholders(f"{text}\n```\nACCUMULATE\n```\nTBD") == ["AUDIT_MS", "OVERHEAD", "TBD"]
