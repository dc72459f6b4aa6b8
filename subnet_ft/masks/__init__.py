"""The subnetwork mask: which weights are trainable, where that came from, and its file."""

from subnet_ft.masks.controls import CONTROLS, control_mask
from subnet_ft.masks.density import density_by_kind, density_by_layer, layer_and_kind
from subnet_ft.masks.extraction import extract
from subnet_ft.masks.file import check_writable
from subnet_ft.masks.mask import SubnetMask, TensorMask
from subnet_ft.masks.names import by_canonical_name, canonical_name
from subnet_ft.masks.provenance import COMPARE_DTYPES, ModelRecord, Provenance, format_fingerprint
from subnet_ft.masks.record import record_base

__all__ = [
    "COMPARE_DTYPES",
    "CONTROLS",
    "ModelRecord",
    "Provenance",
    "SubnetMask",
    "TensorMask",
    "by_canonical_name",
    "canonical_name",
    "check_writable",
    "control_mask",
    "density_by_kind",
    "density_by_layer",
    "extract",
    "format_fingerprint",
    "layer_and_kind",
    "record_base",
]
