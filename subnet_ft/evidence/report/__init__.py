"""The report of a run: assembled from its evidence, written as JSON, Markdown and one HTML page."""

from __future__ import annotations

from subnet_ft.evidence.report.build import build_report
from subnet_ft.evidence.report.run_evidence import RunEvidence
from subnet_ft.evidence.report.schema import DeltaSize, Report
from subnet_ft.evidence.report.summary import lines_for_terminal, summary_for_cli
from subnet_ft.evidence.report.write import write_report

__all__ = [
    "DeltaSize",
    "Report",
    "RunEvidence",
    "build_report",
    "lines_for_terminal",
    "summary_for_cli",
    "write_report",
]
