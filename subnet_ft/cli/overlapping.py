"""`subnet-ft mask overlap`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from subnet_ft import __version__
from subnet_ft.cli.results import FINE, Emit, check_folder
from subnet_ft.errors import SubnetError

if TYPE_CHECKING:
    from subnet_ft.masks import SubnetMask


def mask_overlap(options: argparse.Namespace, emit: Emit) -> int:
    """Compare every two of several masks beside both nulls."""
    from subnet_ft.checkpoints import open_checkpoint
    from subnet_ft.evidence.overlap import overlap_matrix
    from subnet_ft.evidence.overlap_page import lines_for_terminal, summary_for_cli, write_overlaps
    from subnet_ft.masks import SubnetMask

    if options.output is not None:
        check_folder(Path(options.output))
    names = _names(options.masks)
    masks = {name: SubnetMask.load(path) for name, path in zip(names, options.masks, strict=True)}
    base = None if options.base is None else open_checkpoint(options.base)
    overlaps = overlap_matrix(masks, base, progress=not options.quiet)
    files = {} if options.output is None else write_overlaps(overlaps, options.output, version=__version__)
    if options.json:
        emit(json.dumps(summary_for_cli(overlaps, __version__)))
        return FINE
    lines = lines_for_terminal(overlaps)
    if base is None:
        lines += ["", f"  No magnitude-matched null without the base: add --base {_base_of(masks.values())}"]
    if files:
        lines += ["", f"  Overlap: {files['html']}"]
    emit("\n".join(lines))
    return FINE


def _base_of(masks: Iterable[SubnetMask]) -> str:
    """Return what the masks call their base, for a hint."""
    return next((mask.provenance.base.name for mask in masks if mask.provenance.base is not None), "BASE")


def _names(paths: Sequence[str]) -> list[str]:
    """Name masks by their files, and by as many of their folders as tell them apart."""
    parts = [Path(path.removesuffix(".safetensors").removesuffix(".subnet")).parts for path in paths]
    for depth in range(1, max(len(entry) for entry in parts) + 1):
        names = ["/".join(entry[-depth:]) for entry in parts]
        if len(set(names)) == len(names):
            return names
    doubled = next(path for index, path in enumerate(paths) if parts[index] in parts[:index])
    raise SubnetError(f"`{doubled}` is listed twice. Name every mask once.")
