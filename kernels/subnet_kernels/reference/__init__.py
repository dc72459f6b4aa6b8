"""Plain-torch definitions of every op; if another implementation differs, the other one is wrong."""

from subnet_kernels.reference.adamw import masked_adamw
from subnet_kernels.reference.bitmap import count_bits, indices, pack_bits, unpack_bits
from subnet_kernels.reference.compare import CRITERIA, Comparison, changed_bits, compare
from subnet_kernels.reference.copies import compact, gather, patch, scatter, swap
from subnet_kernels.reference.fingerprint import fingerprint
from subnet_kernels.reference.rounding import (
    join_master,
    round_stochastically,
    round_to_bfloat16,
    round_to_weights,
    rounding_key,
    split_master,
)
from subnet_kernels.reference.sgd import masked_sgd
from subnet_kernels.reference.views import bits_view

__all__ = [
    "CRITERIA",
    "Comparison",
    "bits_view",
    "changed_bits",
    "compact",
    "compare",
    "count_bits",
    "fingerprint",
    "gather",
    "indices",
    "join_master",
    "masked_adamw",
    "masked_sgd",
    "pack_bits",
    "patch",
    "round_stochastically",
    "round_to_bfloat16",
    "round_to_weights",
    "rounding_key",
    "scatter",
    "split_master",
    "swap",
    "unpack_bits",
]
