"""`subnet-ft delta push` and `subnet-ft delta pull`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from subnet_ft import __version__
from subnet_ft.cli.results import FINE, Emit, check_folder
from subnet_ft.errors import SubnetError


def push(options: argparse.Namespace, emit: Emit) -> int:
    """Upload a delta with a model card that carries the report's verdict."""
    from subnet_ft.deltas.hub import push_delta

    evidence = [] if options.report is None else evidence_of(Path(options.report))
    address = push_delta(options.delta, options.repo, evidence=evidence, private=options.private)
    emit(json.dumps({"version": __version__, "address": address}) if options.json else address)
    return FINE


def pull(options: argparse.Namespace, emit: Emit) -> int:
    """Download the delta of a repository."""
    from subnet_ft.deltas.hub import pull_delta

    check_folder(Path(options.output).absolute().parent)
    delta = pull_delta(options.repo, options.output, revision=options.revision)
    if options.json:
        emit(json.dumps({"version": __version__, "file": str(delta.path), "sha256": delta.sha256}))
    else:
        emit(f"{delta.path}: {delta.nbytes:,} bytes, SHA-256 {delta.sha256}")
    return FINE


def evidence_of(path: Path) -> list[str]:
    """Return what a report says of a run, a sentence each: its verdict, and that of every control.

    Args:
        path: A `report.json`, or the folder that has one.

    Raises:
        SubnetError: There is none, or it is no report of this release.
    """
    from subnet_ft.evidence.plain import from_plain
    from subnet_ft.evidence.report import Report

    file = path / "report.json" if path.is_dir() else path
    try:
        report = from_plain(Report, json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SubnetError(
            f"`{file}` cannot be read as a report ({type(error).__name__}: {error}). Name the `report.json` of "
            "`subnet-ft run` or `subnet-ft verify`, or its folder."
        ) from error
    lines = [f"{report.title}. Verdict: {report.verdict}. {report.verdict_reason}"]
    lines += [f"Control {name}: {found.name}. {found.reason}" for name, found in report.control_verdicts.items()]
    lines += [f"Above {name}: {found.answer}. {found.reason}" for name, found in report.above_control.items()]
    return lines
