"""The AVX-512 operations that move masked elements without knowing their positions, for numba code.

Every function works on addresses (int64), because numba has no vectors: 32 elements are loaded, moved by a word of the
mask and stored within one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import config, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

_NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512vbmi2", "bmi2")  # Ice Lake, Zen 4 and later


def is_available() -> bool:
    """Return whether numba compiles for a CPU that has these operations."""
    features = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return {f"+{name}" for name in _NEEDED} <= set(features.split(","))


_I1, _I16, _I32, _I64 = (ir.IntType(width) for width in (1, 16, 32, 64))
_HALVES, _WORDS = ir.VectorType(_I16, 32), ir.VectorType(_I32, 16)


def _load(builder: ir.IRBuilder, address: Any, kind: ir.Type) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1, typ=kind)


def _store(builder: ir.IRBuilder, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _suffix(vector: ir.VectorType) -> str:
    return f"v{vector.count}i{vector.element.width}"  # llvmlite names no vectors in intrinsics


def _move(builder: ir.IRBuilder, name: str, vector: Any, mask: Any) -> Any:
    """Compress or expand `vector` by `mask`; zeros fill the rest."""
    kind = ir.FunctionType(vector.type, [vector.type, vector.type, mask.type])
    function = builder.module.declare_intrinsic(f"llvm.x86.avx512.mask.{name}.{_suffix(vector.type)}", (), kind)
    return builder.call(function, [vector, ir.Constant(vector.type, None), mask])


def _masked_store(builder: ir.IRBuilder, vector: Any, address: Any, mask: Any) -> None:
    """Store the elements of `vector` whose bit is set; the memory of the others is not written."""
    pointer = builder.inttoptr(address, vector.type.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [vector.type, pointer.type, _I32, mask.type])
    function = builder.module.declare_intrinsic(f"llvm.masked.store.{_suffix(vector.type)}.p0", (), kind)
    builder.call(function, [vector, pointer, ir.Constant(_I32, 1), mask])


def _bits(builder: ir.IRBuilder, word: Any) -> Any:
    return builder.bitcast(word, ir.VectorType(_I1, word.type.width))


def _compress(vector: ir.VectorType) -> Callable[..., Any]:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        source, word, target = arguments
        # Into a register, then one whole store: compressing to memory is microcode on Zen 4.
        _store(builder, _move(builder, "compress", _load(builder, source, vector), _bits(builder, word)), target)
        return context.get_dummy_value()

    return generate


def _expand(vector: ir.VectorType) -> Callable[..., Any]:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        source, word, stored, target = arguments
        dense = _move(builder, "expand", _load(builder, source, vector), _bits(builder, word))
        _masked_store(builder, dense, target, _bits(builder, stored))
        return context.get_dummy_value()

    return generate


@intrinsic
def compress16(typing_context: Any, source: Any, mask: Any, target: Any) -> Any:
    """Move the masked ones of 32 two-byte elements together.

    Args:
        source: Address of 32 elements. In.
        mask: uint32, bit `i` is element `i`.
        target: Address of room for 32 elements, all of which are written. Out.
    """
    return types.none(types.int64, types.uint32, types.int64), _compress(_HALVES)


@intrinsic
def compress32(typing_context: Any, source: Any, mask: Any, target: Any) -> Any:
    """Do what `compress16` does with 16 four-byte elements and a uint16 mask."""
    return types.none(types.int64, types.uint16, types.int64), _compress(_WORDS)


@intrinsic
def expand16(typing_context: Any, source: Any, mask: Any, stored: Any, target: Any) -> Any:
    """Spread compact two-byte elements over the masked ones of 32, and write some of those.

    Args:
        source: Address of 32 elements, of which as many count as `mask` has bits. In.
        mask: uint32, where the elements belong.
        stored: uint32, which elements of the target are written.
        target: Address of 32 elements. In-out.
    """
    return types.none(types.int64, types.uint32, types.uint32, types.int64), _expand(_HALVES)


@intrinsic
def expand32(typing_context: Any, source: Any, mask: Any, stored: Any, target: Any) -> Any:
    """Do what `expand16` does with 16 four-byte elements and uint16 masks."""
    return types.none(types.int64, types.uint16, types.uint16, types.int64), _expand(_WORDS)


@intrinsic
def differ16(typing_context: Any, left: Any, right: Any) -> Any:
    """Compare 32 two-byte elements at two addresses; return uint32 with the bits of those that differ."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        left, right = (_load(builder, address, _HALVES) for address in arguments)
        return builder.bitcast(builder.icmp_unsigned("!=", left, right), _I32)

    return types.uint32(types.int64, types.int64), generate


@intrinsic
def deposit(typing_context: Any, bits: Any, mask: Any) -> Any:
    """Spread the lowest bits of a uint32 over the set bits of `mask`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_I32, [_I32, _I32])
        function = builder.module.declare_intrinsic("llvm.x86.bmi.pdep.32", (), kind)
        return builder.call(function, arguments)

    return types.uint32(types.uint32, types.uint32), generate


def _loading(kind: ir.IntType) -> Callable[..., Any]:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return _load(builder, arguments[0], kind)

    return generate


@intrinsic
def load32(typing_context: Any, address: Any) -> Any:
    """Read a uint32 at any address."""
    return types.uint32(types.int64), _loading(_I32)


@intrinsic
def load64(typing_context: Any, address: Any) -> Any:
    """Read a uint64 at any address."""
    return types.uint64(types.int64), _loading(_I64)
