"""The overlap of several masks for people: one page with its drawings, lines for a terminal, one JSON object."""

from __future__ import annotations

from subnet_ft.evidence.overlap_page.summary import lines_for_terminal, summary_for_cli
from subnet_ft.evidence.overlap_page.write import write_overlaps

__all__ = ["lines_for_terminal", "summary_for_cli", "write_overlaps"]
