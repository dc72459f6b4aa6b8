"""Forms for the CPU, compiled by numba when first used; no compiler is needed on the user's machine."""

from subnet_kernels.cpu.adamw import masked_adamw
from subnet_kernels.cpu.compact import compact
from subnet_kernels.cpu.compare import changed_bits, compare, count_bits
from subnet_kernels.cpu.copies import gather, patch, scatter, swap
from subnet_kernels.cpu.fingerprint import fingerprint
from subnet_kernels.cpu.sgd import masked_sgd

__all__ = [
    "changed_bits",
    "compact",
    "compare",
    "count_bits",
    "fingerprint",
    "gather",
    "masked_adamw",
    "masked_sgd",
    "patch",
    "scatter",
    "swap",
]
