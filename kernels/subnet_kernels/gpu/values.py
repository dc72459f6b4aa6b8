"""Weights as integers and as float32, in kernels: every conversion is done on bits, so that it is the same everywhere.

A kind is the name of a dtype: `bfloat16`, `float16`, `float32`; `compact` is a gradient that already is (K,) float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from subnet_kernels.gpu.launch import kernel
from subnet_kernels.reference.splitmix import GOLDEN, MULTIPLIERS

KINDS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

_GOLDEN = tl.constexpr(GOLDEN)
_MULTIPLIER_1 = tl.constexpr(MULTIPLIERS[0])
_MULTIPLIER_2 = tl.constexpr(MULTIPLIERS[1])


@kernel
def bits_pointer(address: tl.tensor, KIND: tl.constexpr) -> Any:
    """Return a pointer to the bits of values of a kind.

    Example:
        The address of bfloat16 [1.0] points to int16 [0x3F80].
    """
    if KIND == "float32" or KIND == "compact":
        pointer = address.to(tl.pointer_type(tl.int32))
    else:
        pointer = address.to(tl.pointer_type(tl.int16))
    return pointer


@kernel
def widen(bits: tl.tensor, KIND: tl.constexpr) -> Any:
    """Return the float32 of a kind's bits.

    Example:
        0x3F80 of bfloat16 is 1.0.
    """
    if KIND == "bfloat16":
        # Triton's interpreter casts bfloat16 by other rules than a GPU, so no cast happens at all.
        value = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == "float16":
        value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = bits.to(tl.float32, bitcast=True)
    return value


@kernel
def upper_half(value: tl.tensor) -> Any:
    """Return the bits of float32 rounded to bfloat16 as int32, ties away from zero; every NaN becomes the quiet one.

    Example:
        0x3F808000, half way between 0x3F80 and 0x3F81, becomes 0x3F81.
    """
    rounded = (value.to(tl.int32, bitcast=True) + 0x8000) >> 16
    return tl.where(value != value, 0x7FC0, rounded)


@kernel
def narrow(value: tl.tensor, KIND: tl.constexpr) -> Any:
    """Round float32 to a kind and return its bits.

    Example:
        1.00390625, half way between two bfloat16, gives 0x3F81.
    """
    if KIND == "bfloat16":
        bits = upper_half(value).to(tl.int16)
    elif KIND == "float16":
        bits = value.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        bits = value.to(tl.int32, bitcast=True)
    return bits


@kernel
def join(upper: tl.tensor, remainder: tl.tensor) -> Any:
    """Return the float32 master of bfloat16 bits and an int16 remainder.

    Example:
        0x3F81 and -0x8000 are the master 0x3F808000.
    """
    return ((upper.to(tl.int32) << 16) + remainder.to(tl.int32)).to(tl.float32, bitcast=True)


@kernel
def split(master: tl.tensor) -> Any:
    """Return the bfloat16 bits of a float32 master and the int16 remainder that restores it.

    Example:
        0x3F808000 gives 0x3F81 and -0x8000.
    """
    upper = upper_half(master)
    remainder = tl.where(master != master, 0, master.to(tl.int32, bitcast=True) - (upper << 16))
    return upper.to(tl.int16), remainder.to(tl.int16)


@kernel
def mix(x: tl.tensor) -> Any:
    """Mix the bits of uint64, as SplitMix64 does at its end.

    Example:
        0x9E3779B97F4A7C15, the first state of seed 0, gives 0xE220A8397B1DCDAF.
    """
    x = (x ^ (x >> 30)) * _MULTIPLIER_1
    x = (x ^ (x >> 27)) * _MULTIPLIER_2
    return x ^ (x >> 31)


@kernel
def round_stochastically(value: tl.tensor, index: tl.tensor, key: tl.tensor) -> Any:
    """Return the bits of float32 rounded up or down to bfloat16 by random bits of the flat index, as int16.

    Example:
        1.0 is a bfloat16 and stays 0x3F80, whatever the key.
    """
    random = mix((index + 1) * _GOLDEN + key) >> 48
    # In 32 bits the sum overflows for some NaNs only, and those are replaced.
    upper = (value.to(tl.uint32, bitcast=True) + random.to(tl.uint32)) >> 16
    return tl.where(value != value, 0x7FC0, upper).to(tl.int16)
