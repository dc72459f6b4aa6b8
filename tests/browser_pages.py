"""What tests of pages in a browser share: opening one, and looking at it as a reader would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page

_LEGIBILITY = (Path(__file__).parent / "browser" / "legibility.js").read_text(encoding="utf-8")
_READABLE = {"smallest": 10, "contrast": 4.5, "large": 3}
"""Size of the smallest text in CSS pixels, and the contrasts of WCAG 2.2, level AA."""

Scheme = Literal["light", "dark"]


@contextmanager
def opened(browser: Browser, path: Path, width: int, scheme: Scheme = "light") -> Iterator[Page]:
    """Open a file in a window of that width, without a network."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    page.goto(path.as_uri())
    yield page
    context.close()


def unfold(page: Page) -> None:
    """Open everything that is folded."""
    page.evaluate("document.querySelectorAll('details').forEach((entry) => { entry.open = true; })")


def problems(page: Page) -> list[str]:
    """Return what a reader could not read, one sentence each."""
    found: list[str] = page.evaluate(_LEGIBILITY, _READABLE)
    return found
