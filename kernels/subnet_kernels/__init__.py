"""Kernels for training a subnetwork: tensors in, tensors out; no names, no models, no config.

Dense tensors are flat `(N,)`, compact ones `(K,)` in the order of the mask's true bits, masks `(ceil(N / 8),)` uint8:
bit `i` of byte `j` stands for element `8 * j + i`, and padding bits are zero.
"""

from subnet_kernels.dispatch import backends, choose
from subnet_kernels.ops import (
    CRITERIA,
    bits_view,
    changed_bits,
    count_bits,
    fingerprint,
    gather,
    masked_adamw,
    pack_bits,
    round_to_bfloat16,
    scatter,
    unpack_bits,
)

__all__ = [
    "CRITERIA",
    "backends",
    "bits_view",
    "changed_bits",
    "choose",
    "count_bits",
    "fingerprint",
    "gather",
    "masked_adamw",
    "pack_bits",
    "round_to_bfloat16",
    "scatter",
    "unpack_bits",
]
