"""The subnetwork mask: which weights are trainable, where that came from, and its file."""

from subnet_ft.masks.controls import CONTROLS, control_mask
from subnet_ft.masks.density import density_by_kind, density_by_layer, layer_and_kind
from subnet_ft.masks.extraction import extract
from subnet_ft.masks.mask import ModelRecord, Provenance, SubnetMask, TensorMask, canonical_name

__all__ = [
    "CONTROLS",
    "ModelRecord",
    "Provenance",
    "SubnetMask",
    "TensorMask",
    "canonical_name",
    "control_mask",
    "density_by_kind",
    "density_by_layer",
    "extract",
    "layer_and_kind",
]
