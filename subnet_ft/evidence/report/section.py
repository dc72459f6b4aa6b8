"""What a report says, before it is laid out: sections of figures that answer a question each.

HTML shows drawings and tables, Markdown answers and tables, a terminal the answers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from subnet_ft.evidence.report.tables import Table


@dataclass(frozen=True)
class Key:
    """One entry of a legend."""

    style: str
    text: str


@dataclass(frozen=True)
class Panel:
    """One of several small drawings of a kind beside each other."""

    title: str
    draw: Callable[[float], str | None]


@dataclass(frozen=True)
class Figure:
    """A question, its answer in words, and a drawing or a table that shows it."""

    id: str
    """Unique in the report; the page's anchor."""
    question: str
    """The title."""
    answer: str
    """One to three sentences with the numbers."""
    draw: Callable[[float], str | None] | None = None
    """Gives the drawing for a width; `None` where there is nothing to draw."""
    caption: str = ""
    """How to read the drawing."""
    keys: Sequence[Key] = ()
    """Legend."""
    mark: Literal["stroke", "swatch", "dot"] = "swatch"
    """Shape of the legend's marks."""
    panels: Sequence[Panel] = ()
    """Small drawings instead of one."""
    table: Table | None = None
    """The same numbers as text."""
    is_table_open: bool = False
    """Whether the table is shown without being asked for."""


@dataclass(frozen=True)
class Section:
    """One subject."""

    id: str
    title: str
    figures: list[Figure]
    notes: list[str] = field(default_factory=list)
    """What a reader must know to judge the numbers, below the figures."""
