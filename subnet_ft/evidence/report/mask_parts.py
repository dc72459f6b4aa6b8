"""What a report says of the subnetwork's mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from subnet_ft.evidence.cost import mask_origin
from subnet_ft.evidence.plain import as_json
from subnet_ft.evidence.report.schema import Density, MaskInfo
from subnet_ft.masks.density import layer_and_kind

if TYPE_CHECKING:
    from subnet_ft.masks import SubnetMask


def density_of(mask: SubnetMask) -> Density:
    """Return the trainable share by layer, kind and tolerance."""
    by_layer_and_kind: dict[str, dict[str, float]] = {}
    for name, tensor in mask.tensors.items():
        layer, kind = layer_and_kind(name)
        by_layer_and_kind.setdefault(layer, {})[kind] = tensor.count / max(tensor.num_elements, 1)
    return Density(
        overall=mask.density,
        by_layer=mask.density_by_layer(),
        by_kind=mask.density_by_kind(),
        by_layer_and_kind=by_layer_and_kind,
        by_tolerance=dict(mask.provenance.density_by_tolerance),
    )


def mask_info(mask: SubnetMask, seconds: float | None, recipe: Mapping[str, Any]) -> MaskInfo:
    """Return a mask's own record and which run it was made from.

    Args:
        mask: The mask.
        seconds: Time to make it, without that run.
        recipe: The resolved recipe, or empty.
    """
    origin = mask.provenance
    return MaskInfo(
        num_trainable=mask.num_trainable,
        num_parameters=mask.num_parameters,
        fingerprint=mask.fingerprint,
        criterion=origin.criterion,
        tolerance=origin.tolerance,
        compare_dtype=origin.compare_dtype,
        source=as_json(origin.source),
        base=origin.base.name if origin.base else None,
        tuned=origin.tuned.name if origin.tuned else None,
        seconds=seconds,
        origin=mask_origin(
            origin.source,
            recipe_kind=recipe.get("subnet", {}).get("source", {}).get("kind"),
            has_tuned=origin.tuned is not None,
        ),
    )
