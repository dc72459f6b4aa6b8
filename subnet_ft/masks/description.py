"""A mask in figures, for scripts, and in lines, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subnet_ft.masks.mask import SubnetMask


def mask_figures(mask: SubnetMask) -> dict[str, Any]:
    """Return what a mask holds and where it comes from, as JSON values."""
    provenance = mask.provenance
    return {
        "density": mask.density,
        "num_trainable": mask.num_trainable,
        "num_parameters": mask.num_parameters,
        "density_by_tolerance": provenance.density_by_tolerance,
        "density_by_layer": mask.density_by_layer(),
        "density_by_kind": mask.density_by_kind(),
        "criterion": provenance.criterion,
        "tolerance": provenance.tolerance,
        "compare_dtype": provenance.compare_dtype,
        "base": provenance.base.name if provenance.base else None,
        "tuned": provenance.tuned.name if provenance.tuned else None,
        "source": provenance.source,
        "fingerprint": mask.fingerprint,
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "count": tensor.count,
                "density": tensor.count / max(tensor.num_elements, 1),
            }
            for name, tensor in mask.tensors.items()
        },
    }


def mask_lines(mask: SubnetMask) -> list[str]:
    """Return size, origin and densities of a mask as lines of text."""
    provenance = mask.provenance
    lines = [
        f"{mask.num_trainable:,} of {mask.num_parameters:,} weights, density {mask.density:.4f} "
        f"(update sparsity {1 - mask.density:.1%})"
    ]
    if provenance.base:
        lines.append(f"  base       {provenance.base.name}")
    if provenance.tuned:
        lines.append(f"  tuned      {provenance.tuned.name}")
    if provenance.source:
        lines.append(f"  source     {_source(provenance.source)}")
    if provenance.criterion:
        lines.append(f"  criterion  {provenance.criterion}, tolerance {provenance.tolerance:g}")
    for title, densities in (
        ("tolerance", provenance.density_by_tolerance),
        ("layer", mask.density_by_layer()),
        ("kind", mask.density_by_kind()),
    ):
        if densities:
            width = max(len(key) for key in densities)
            lines += [
                "",
                f"  density by {title}",
                *(f"    {key:<{width}}  {value:.4f}" for key, value in densities.items()),
            ]
    return lines


def _source(source: Mapping[str, Any]) -> str:
    """Name a kind and its parameters; masks that it was made of are shortened or counted."""
    words = [str(source.get("kind", "unknown"))]
    for key, value in source.items():
        if key == "of" and isinstance(value, list):
            words.append(f"of {len(value)} masks")
        elif key == "of":
            words.append(f"of {str(value)[:12]}")
        elif key not in ("kind", "sources"):
            words.append(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(words)
