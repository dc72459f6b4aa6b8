"""Write the JSON schemas of reports, comparisons and studies to docs/ (`make schemas`)."""

from __future__ import annotations

import json
from pathlib import Path

from subnet_ft.evidence.comparison import MethodComparison
from subnet_ft.evidence.json_schema import json_schema
from subnet_ft.evidence.report import Report
from subnet_ft.studies.schema import StudyReport

DOCS = Path(__file__).resolve().parent.parent / "docs"
KINDS: dict[str, type] = {"report": Report, "comparison": MethodComparison, "study": StudyReport}


def schema_text(name: str) -> str:
    """Return what `docs/NAME.schema.json` must hold."""
    schema = json_schema(KINDS[name], identifier=f"urn:subnet-ft:{name}:1")
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in KINDS:
        (DOCS / f"{name}.schema.json").write_text(schema_text(name), encoding="utf-8")
