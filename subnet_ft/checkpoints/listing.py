"""Names in messages: the first few, and how many more there are."""

from __future__ import annotations

from collections.abc import Sequence


def listing(names: Sequence[str], *, limit: int = 3) -> str:
    """List parameter names, or phrases that start with one in backquotes.

    Example:
        `["a", "b", "c", "d"]` becomes "`a`, `b`, `c` and 1 more", an empty list "none".
    """
    if not names:
        return "none"
    shown = ", ".join(name if name.startswith("`") else f"`{name}`" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
