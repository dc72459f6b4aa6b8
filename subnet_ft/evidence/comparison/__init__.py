"""Several methods beside each other on one recipe: one table, one page, one JSON object."""

from __future__ import annotations

from subnet_ft.evidence.comparison.build import CopyEvidence, MethodEvidence, build_comparison
from subnet_ft.evidence.comparison.schema import MethodComparison
from subnet_ft.evidence.comparison.summary import lines_for_terminal, summary_for_cli
from subnet_ft.evidence.comparison.write import write_comparison

__all__ = [
    "CopyEvidence",
    "MethodComparison",
    "MethodEvidence",
    "build_comparison",
    "lines_for_terminal",
    "summary_for_cli",
    "write_comparison",
]
