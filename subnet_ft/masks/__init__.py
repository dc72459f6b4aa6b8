"""The subnetwork mask: which weights are trainable, where that came from, and its file."""

from subnet_ft.masks.base_masks import BASE_KINDS, base_mask
from subnet_ft.masks.combination import RULES, combine
from subnet_ft.masks.controls import CONTROLS, control_mask
from subnet_ft.masks.density import density_by_kind, density_by_layer, layer_and_kind
from subnet_ft.masks.early import early_mask
from subnet_ft.masks.extraction import extract
from subnet_ft.masks.file import check_writable
from subnet_ft.masks.mask import SubnetMask, TensorMask
from subnet_ft.masks.names import by_canonical_name, canonical_name
from subnet_ft.masks.provenance import COMPARE_DTYPES, ModelRecord, Provenance, format_fingerprint
from subnet_ft.masks.record import record_base

__all__ = [
    "BASE_KINDS",
    "COMPARE_DTYPES",
    "CONTROLS",
    "RULES",
    "ModelRecord",
    "Provenance",
    "SubnetMask",
    "TensorMask",
    "base_mask",
    "by_canonical_name",
    "canonical_name",
    "check_writable",
    "combine",
    "control_mask",
    "density_by_kind",
    "density_by_layer",
    "early_mask",
    "extract",
    "format_fingerprint",
    "layer_and_kind",
    "record_base",
]
