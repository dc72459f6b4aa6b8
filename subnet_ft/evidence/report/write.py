"""Writes a report's three files, each whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subnet_ft.evidence.report.html import render_html
from subnet_ft.evidence.report.markdown import render_markdown
from subnet_ft.evidence.report.schema import Report


def write_report(report: Report, folder: str | Path) -> dict[str, Path]:
    """Write `report.json`, `report.md` and `report.html` into a folder, which is made if needed.

    All three are rendered before the first is replaced, and each is replaced in one step.

    Returns:
        `json`, `md` and `html` to the file's path.
    """
    pages = {"md": render_markdown(report), "html": render_html(report)}
    return write_files(Path(folder) / "report", report.to_dict(), pages)


def write_files(stem: Path, fields: dict[str, Any], pages: Mapping[str, str]) -> dict[str, Path]:
    """Write `stem.json` and a page `stem.KIND` for every kind; the folder is made if needed.

    Args:
        stem: Folder and name without a suffix.
        fields: What the JSON file holds.
        pages: Kind to text, rendered before the first file is replaced.

    Returns:
        `json` and every kind to the file's path.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    contents = {"json": json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n", **pages}
    return {kind: replace_file(stem.with_suffix(f".{kind}"), content) for kind, content in contents.items()}


def replace_file(path: Path, content: str) -> Path:
    """Write a text file; it appears whole or not at all, and an older one stays until then."""
    # Lone surrogates, which a tokenizer's output may hold, have no UTF-8 form.
    data = content.encode("utf-8", errors="replace")
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
