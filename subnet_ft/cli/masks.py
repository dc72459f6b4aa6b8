"""`subnet-ft extract` and `subnet-ft mask info`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from subnet_ft import __version__
from subnet_ft.cli.results import FINE, Emit, check_folder

if TYPE_CHECKING:
    from subnet_ft.masks import SubnetMask


def extract_mask(options: argparse.Namespace, emit: Emit) -> int:
    """Write the mask of the weights that differ, and print its figures."""
    from subnet_ft.masks import extract
    from subnet_ft.masks.file import check_writable

    check_writable(Path(options.output))
    check_folder(Path(options.output).parent)
    mask = extract(
        options.base,
        options.tuned,
        criterion=options.criterion,
        tolerance=options.tolerance,
        dtype=options.dtype,
        progress=not options.quiet,
    )
    emit_saved(mask, options, emit)
    return FINE


def mask_info(options: argparse.Namespace, emit: Emit) -> int:
    """Print what a mask file holds."""
    from subnet_ft.masks import SubnetMask

    _emit_mask(SubnetMask.load(options.mask), options, emit)
    return FINE


def emit_saved(mask: SubnetMask, options: argparse.Namespace, emit: Emit) -> None:
    """Save a mask at `options.output` and print its figures."""
    path = mask.save(options.output)
    _emit_mask(mask, options, emit)
    if not options.json:
        emit(f"  saved in {path}")


def _emit_mask(mask: SubnetMask, options: argparse.Namespace, emit: Emit) -> None:
    from subnet_ft.masks.description import mask_figures, mask_lines

    if options.json:
        emit(json.dumps({"version": __version__, **mask_figures(mask)}))
    else:
        emit("\n".join(mask_lines(mask)))
