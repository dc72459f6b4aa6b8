"""How functions are compiled here, and the machine operations that numba has no name for."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

logger = logging.getLogger(__name__)

# Division as numpy does it: Python's check for zero would keep loops from being vectorised. No fastmath: every
# operation rounds by itself, as in the reference.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def digest_of_sources(package: Path) -> str:
    """Return the SHA-256 of every Python file of a package, in all its folders."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))).hexdigest()


# numba compares only the file of the function itself, but compiled into it are functions and constants of others.
_SOURCES = digest_of_sources(Path(__file__).parents[1])


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function when it is first called; the result is cached on disk where a folder can be written.

    What is cached holds as long as no file of the package `subnet_kernels` changes.
    """
    return _compiled(function, _OPTIONS)


def compiled_sum(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function as `compiled` does, but let additions change places: only for sums of many numbers."""
    return _compiled(function, {**_OPTIONS, "fastmath": {"reassoc"}})


def _compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    try:
        dispatcher = numba.njit(cache=True, **options)(function)
        index = dispatcher._cache._cache_file
        index._source_stamp = (index._source_stamp, _SOURCES)
    except (RuntimeError, AttributeError) as error:  # no folder to write to, or another numba
        logger.info("compiling `%s` anew in every process: %s", function.__name__, error)
        return numba.njit(**options)(function)  # type: ignore[no-any-return]
    return dispatcher  # type: ignore[no-any-return]


@intrinsic
def trailing_zeros(typing_context: Any, word: Any) -> Any:
    """Return how many zero bits lie below the lowest set bit of a uint64; 64 for zero."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        word_type = ir.IntType(64)
        kind = ir.FunctionType(word_type, [word_type, ir.IntType(1)])
        function = builder.module.declare_intrinsic("llvm.cttz", [word_type], kind)
        return builder.call(function, [arguments[0], ir.Constant(ir.IntType(1), 0)])

    return types.uint64(types.uint64), generate


@intrinsic
def popcount(typing_context: Any, word: Any) -> Any:
    """Count the set bits of a uint64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        word_type = ir.IntType(64)
        function = builder.module.declare_intrinsic("llvm.ctpop", [word_type], ir.FunctionType(word_type, [word_type]))
        return builder.call(function, [arguments[0]])

    return types.uint64(types.uint64), generate


@intrinsic
def half_to_float(typing_context: Any, bits: Any) -> Any:
    """Read uint16 bits as float16 and return the float32 of the same value."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def float_to_half(typing_context: Any, value: Any) -> Any:
    """Round a float32 to the nearest float16, ties to even, and return its bits as uint16."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def as_pointer(typing_context: Any, address: Any) -> Any:
    """Read an int64 as an address, for `numba.carray`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line at an int64 address, to be written soon; nothing happens where there is no memory."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(function, [pointer, *(ir.Constant(flag, value) for value in (1, 3, 1))])
        return context.get_dummy_value()

    return types.none(types.int64), generate
