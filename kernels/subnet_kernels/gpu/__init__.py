"""Triton forms for GPUs, and for its interpreter; they give the reference's bits. Only this folder imports triton."""

from subnet_kernels.gpu.compact import compact
from subnet_kernels.gpu.compare import changed_bits
from subnet_kernels.gpu.copies import gather, scatter, swap
from subnet_kernels.gpu.fingerprint import fingerprint
from subnet_kernels.gpu.updates import masked_adamw, masked_sgd

__all__ = [
    "changed_bits",
    "compact",
    "fingerprint",
    "gather",
    "masked_adamw",
    "masked_sgd",
    "scatter",
    "swap",
]
