"""Plain-torch definitions of every op; if another implementation differs, the other one is wrong."""

from subnet_kernels.reference.adamw import masked_adamw
from subnet_kernels.reference.bitmap import count_bits, gather, pack_bits, scatter, unpack_bits
from subnet_kernels.reference.compare import CRITERIA, changed_bits
from subnet_kernels.reference.fingerprint import fingerprint
from subnet_kernels.reference.rounding import join_master, round_to_bfloat16, split_master
from subnet_kernels.reference.views import bits_view

__all__ = [
    "CRITERIA",
    "bits_view",
    "changed_bits",
    "count_bits",
    "fingerprint",
    "gather",
    "join_master",
    "masked_adamw",
    "pack_bits",
    "round_to_bfloat16",
    "scatter",
    "split_master",
    "unpack_bits",
]
