"""The ops: checked arguments, then the implementation that `dispatch` names."""

from subnet_kernels.ops.bits import changed_bits, compare, count_bits, pack_bits, unpack_bits
from subnet_kernels.ops.copies import compact, gather, patch, scatter, swap
from subnet_kernels.ops.hashing import fingerprint
from subnet_kernels.ops.updates import masked_adamw, masked_sgd

__all__ = [
    "changed_bits",
    "compact",
    "compare",
    "count_bits",
    "fingerprint",
    "gather",
    "masked_adamw",
    "masked_sgd",
    "pack_bits",
    "patch",
    "scatter",
    "swap",
    "unpack_bits",
]
