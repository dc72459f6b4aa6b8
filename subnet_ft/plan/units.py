"""Bytes as people write them, read and written."""

from __future__ import annotations

import re

from subnet_ft.errors import PlanError

_WRITTEN = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])?(I)?B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def parse_memory(text: str) -> int:
    """Read a size such as `24GB` (24e9 bytes), `24GiB` (24 * 2**30) or `80g`.

    Raises:
        PlanError: It is no size above 0.
    """
    found = _WRITTEN.fullmatch(text.strip())
    size = 0
    if found is not None:
        number, letter, is_binary = found.groups()
        size = int(float(number) * (1024 if is_binary else 1000) ** _POWERS[(letter or "").upper()])
    if size < 1:
        raise PlanError(f"`{text}` is no size of a memory. Write it with its unit: 24GB, 24GiB or 80g.")
    return size


def size_text(size: float) -> str:
    """Return bytes with three digits and the largest unit that leaves one before the point."""
    for scale, unit in _UNITS:
        if size >= scale:
            value = size / scale
            return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{size:.0f} B"
