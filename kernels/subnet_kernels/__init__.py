"""Kernels for training a subnetwork: tensors in, tensors out; no names, no models, no config.

Dense tensors are flat `(N,)`, compact ones `(K,)` in the order of the mask's true bits. A mask is one bit per element,
`(ceil(N / 8),)` uint8: bit `i` of byte `j` stands for element `8 * j + i`, and padding bits are zero. `BitMask` adds
the slot at which every tile of 1,024 elements starts.
"""

from subnet_kernels.dispatch import BACKENDS, backends, choose
from subnet_kernels.layout import SEGMENT_TILES, TILE_SIZE, BitMask
from subnet_kernels.ops import (
    changed_bits,
    compact,
    compare,
    count_bits,
    fingerprint,
    gather,
    masked_adamw,
    masked_sgd,
    pack_bits,
    patch,
    scatter,
    swap,
    unpack_bits,
)
from subnet_kernels.reference import (
    CRITERIA,
    Comparison,
    bits_view,
    join_master,
    round_to_bfloat16,
    round_to_weights,
    rounding_key,
    split_master,
)
from subnet_kernels.updates import AdamWUpdate, SGDUpdate

__all__ = [
    "BACKENDS",
    "CRITERIA",
    "SEGMENT_TILES",
    "TILE_SIZE",
    "AdamWUpdate",
    "BitMask",
    "Comparison",
    "SGDUpdate",
    "backends",
    "bits_view",
    "changed_bits",
    "choose",
    "compact",
    "compare",
    "count_bits",
    "fingerprint",
    "gather",
    "join_master",
    "masked_adamw",
    "masked_sgd",
    "pack_bits",
    "patch",
    "round_to_bfloat16",
    "round_to_weights",
    "rounding_key",
    "scatter",
    "split_master",
    "swap",
    "unpack_bits",
]
