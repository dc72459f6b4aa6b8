"""`subnet-ft delta`: making, applying and comparing sparse checkpoints."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subnet_ft import __version__
from subnet_ft.cli.results import FINE, VERIFICATION_FAILED, Emit, check_folder, printable
from subnet_ft.errors import SubnetError

if TYPE_CHECKING:
    from subnet_ft.checkpoints import Checkpoint
    from subnet_ft.deltas import DeltaFile
    from subnet_ft.masks import SubnetMask

_SHOWN = 5


def export(options: argparse.Namespace, emit: Emit) -> int:
    """Write the delta of two checkpoints, and print its figures."""
    from subnet_ft.deltas import export_delta

    _check_output(options)
    delta = export_delta(
        _base(options),
        options.tuned,
        options.output,
        mask=options.mask,
        mask_reference=options.mask_reference,
        zstd=options.zstd,
        progress=not options.quiet,
    )
    _emit_file(delta, options, emit)
    return FINE


def apply(options: argparse.Namespace, emit: Emit) -> int:
    """Apply a delta to its base: to a new folder, or in place."""
    from subnet_ft.deltas import apply_delta
    from subnet_ft.deltas.checks import open_deltas

    if options.output is not None:
        check_folder(Path(options.output).absolute().parent)
    deltas = open_deltas(options.deltas, _masks(options))
    folder = apply_delta(_base(options), deltas, options.output, in_place=options.in_place)
    if options.json:
        emit(json.dumps({"version": __version__, "folder": str(folder), "in_place": options.in_place}))
    else:
        undo = f"; undo with `{shlex.join(['subnet-ft', 'delta', 'revert', str(folder)])}`" if options.in_place else ""
        emit(f"{folder}: the base with {len(options.deltas)} delta{'s' * (len(options.deltas) > 1)} applied{undo}")
    return FINE


def revert(options: argparse.Namespace, emit: Emit) -> int:
    """Undo the last delta that was applied in place."""
    from subnet_ft.deltas import revert_delta

    folder = revert_delta(options.folder)
    emit(json.dumps({"version": __version__, "folder": str(folder)}) if options.json else f"{folder}: as before")
    return FINE


def info(options: argparse.Namespace, emit: Emit) -> int:
    """Print what a delta file holds."""
    from subnet_ft.deltas import DeltaFile
    from subnet_ft.deltas.download import located

    _emit_file(DeltaFile(located(options.delta)), options, emit)
    return FINE


def diff(options: argparse.Namespace, emit: Emit) -> int:
    """Print what two deltas of one base have in common."""
    from subnet_ft.deltas import diff_deltas
    from subnet_ft.deltas.checks import open_deltas

    first, second = open_deltas([options.first, options.second], _masks(options))
    found = diff_deltas(first, second)
    totals = {
        key: sum(getattr(entry, key) for entry in found.values()) for key in ("first", "second", "shared", "equal")
    }
    if options.json:
        tensors = {name: asdict(entry) for name, entry in found.items()}
        emit(json.dumps({"version": __version__, **totals, "tensors": tensors}))
        return FINE
    emit(f"{options.first} changes {totals['first']:,} weights, {options.second} {totals['second']:,}")
    emit(f"  both change {totals['shared']:,}, {_share(totals['shared'], totals['first'])} of the first's")
    emit(f"  to the same value {totals['equal']:,}, {_share(totals['equal'], totals['shared'])} of those")
    return FINE


def compose(options: argparse.Namespace, emit: Emit) -> int:
    """Write one delta that does what two do, and print its figures."""
    from subnet_ft.deltas import compose_deltas
    from subnet_ft.deltas.checks import open_deltas

    _check_output(options)
    first, second = open_deltas([options.first, options.second], _masks(options))
    delta = compose_deltas(
        first,
        second,
        options.output,
        base=_base(options) if options.base or options.base_revision else None,
        on_conflict=options.on_conflict,
        zstd=options.zstd,
    )
    _emit_file(delta, options, emit)
    return FINE


def verify(options: argparse.Namespace, emit: Emit) -> int:
    """Check that a delta belongs to a base, and leads to a tuned checkpoint."""
    from subnet_ft.deltas import verify_delta
    from subnet_ft.deltas.checks import open_deltas

    found = verify_delta(_base(options), open_deltas(options.delta, _masks(options)), options.tuned)
    if options.json:
        emit(json.dumps({"version": __version__, "fine": found.is_fine, **asdict(found)}))
    else:
        parts = {
            "the base": found.wrong_base,
            "base and delta together": found.wrong_result,
            "the tuned checkpoint": found.wrong_tuned,
        }
        for what, wrong in parts.items():
            if wrong is not None:
                names = printable(", ".join(wrong[:_SHOWN]))
                shown = names + (f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else "")
                emit(f"{what}: {f'{len(wrong)} tensors differ: {shown}' if wrong else 'every fingerprint as recorded'}")
    return FINE if found.is_fine else VERIFICATION_FAILED


def to_shira(options: argparse.Namespace, emit: Emit) -> int:
    """Write a delta as a SHiRA adapter for PEFT."""
    from subnet_ft.deltas import export_shira
    from subnet_ft.deltas.checks import open_deltas

    check_folder(Path(options.output).absolute().parent)
    (delta,) = open_deltas(options.delta, _masks(options))
    folder = export_shira(_base(options), delta, options.output, pad=options.pad)
    if options.json:
        emit(json.dumps({"version": __version__, "folder": str(folder)}))
    else:
        emit(f"{folder}: `PeftModel.from_pretrained(base, {str(folder)!r})` loads it")
    return FINE


def _check_output(options: argparse.Namespace) -> None:
    from subnet_ft.deltas.writing import check_writable

    check_writable(Path(options.output))
    check_folder(Path(options.output).absolute().parent)


def _base(options: argparse.Namespace) -> str | Checkpoint:
    """Return the base by its name, or, where that alone does not say which it is, opened."""
    if options.base_revision is None:
        name: str = options.base
        return name
    if options.base is None:
        raise SubnetError("`--base-revision` says which revision of a base is meant. Name the base, too (`--base`).")
    from subnet_ft.checkpoints import open_checkpoint

    return open_checkpoint(options.base, revision=options.base_revision)


def _masks(options: argparse.Namespace) -> list[SubnetMask]:
    from subnet_ft.masks import SubnetMask

    return [SubnetMask.load(mask) for mask in options.mask]


def _emit_file(delta: DeltaFile, options: argparse.Namespace, emit: Emit) -> None:
    figures = delta_figures(delta)
    if options.json:
        emit(json.dumps({"version": __version__, "file": str(delta.path), **figures}))
        return
    count, total, nbytes = figures["num_values"], figures["num_parameters"], figures["bytes"]
    emit(f"{delta.path}: {count:,} of {total:,} weights, density {figures['density']:.4%}")
    emit(f"  {nbytes:,} bytes, {figures['bytes_per_parameter']:.3f} per parameter, {figures['encoding']}")
    if figures["mask"] is not None:
        emit(f"  positions in the mask {figures['mask']}")
    at = f" at {figures['base_revision']}" if figures["base_revision"] else ""
    emit(f"  base   {figures['base_digest'][:16]}  {printable(figures['base'] + at)}")
    emit(f"  result {figures['result_digest'][:16]}")
    emit(f"  SHA-256 {figures['sha256']}")


def delta_figures(delta: DeltaFile) -> dict[str, Any]:
    """Return what a delta file says about itself, as JSON has it."""
    from subnet_ft.deltas.checks import base_digest, result_digest

    return {
        "num_values": delta.num_values,
        "num_parameters": delta.num_parameters,
        "density": delta.density,
        "bytes": delta.nbytes,
        "bytes_per_parameter": delta.nbytes / max(delta.num_parameters, 1),
        "encoding": delta.header.encoding,
        "mask": delta.header.mask_fingerprint,
        "sha256": delta.sha256,
        "base": delta.header.base_name,
        "base_revision": delta.header.base_revision,
        "base_digest": base_digest(delta),
        "result_digest": result_digest(delta),
        "source": delta.header.source,
        "tensors": {
            name: {"shape": list(entry.shape), "dtype": entry.dtype, "count": entry.count}
            for name, entry in delta.entries.items()
        },
    }


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"
