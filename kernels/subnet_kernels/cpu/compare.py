"""Comparing two tensors: 64 elements become a word of bits by one vector comparison, whatever the criterion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from subnet_kernels.cpu.fingerprint import sums_of_pair
from subnet_kernels.cpu.jit import compiled, half_to_float, popcount
from subnet_kernels.cpu.threads import run, split
from subnet_kernels.reference.compare import Comparison
from subnet_kernels.reference.views import bits_view

_BLOCK = 2048  # elements whose float32 copies stay in the first-level cache; whole words of bits
_SMALL = 1 << 14  # elements below which a second thread costs more than it saves
_FEW_BYTES = 1 << 20  # the same for bytes whose bits are counted
_INFINITY = np.float32(np.inf)

_BFLOAT16, _FLOAT16, _FLOAT32 = range(3)
_KINDS = {torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16, torch.float32: _FLOAT32}


def count_bits(bits: torch.Tensor) -> int:
    """Count the set bits of (B,) uint8."""
    array = bits.contiguous().numpy()
    whole = array.size // 8 * 8
    words = array[:whole].view(np.uint64)
    tasks = [(words[start:stop],) for start, stop in split(words.size, 1 if whole < _FEW_BYTES else None)]
    rest = sum(byte.bit_count() for byte in array[whole:].tolist())
    return int(sum(run(_count, tasks), rest))


def changed_bits(
    base: torch.Tensor, tuned: torch.Tensor, *, criterion: str, tolerance: float
) -> tuple[torch.Tensor, int]:
    """Return the packed bits of the changed elements of two (N,) tensors, and their count."""
    bits = torch.empty((base.numel() + 7) // 8, dtype=torch.uint8)
    if criterion == "exact":
        return bits, sum(run(_changed, _cut(base, tuned, bits)))
    if base.dtype not in _KINDS:
        base, tuned = base.float(), tuned.float()
    options = (_KINDS[base.dtype], criterion == "relative", _as_float32([tolerance])[0])
    tasks = [(*arrays, *options) for arrays in _cut(base, tuned, bits)]
    return bits, sum(run(_changed_beyond, tasks))


def compare(base: torch.Tensor, tuned: torch.Tensor, *, offset: int, tolerances: Sequence[float]) -> Comparison:
    """Return the exactly changed bits of two (N,) tensors, their distances and both fingerprints."""
    bits = torch.empty((base.numel() + 7) // 8, dtype=torch.uint8)
    thresholds = _as_float32(tolerances)
    tasks, start = [], offset
    for arrays in _cut(base, tuned, bits):
        tasks.append((*arrays, start, _KINDS[base.dtype], thresholds))
        start += arrays[0].size
    parts = run(_compare, tasks)
    sums = [sum(int(part[2][which]) for part in parts) % 2**64 for which in range(4)]
    return Comparison(
        bits=bits,
        count=sum(part[0] for part in parts),
        beyond=tuple(sum(int(part[1][which]) for part in parts) for which in range(len(tolerances))),
        base_fingerprint=(sums[0], sums[1]),
        tuned_fingerprint=(sums[2], sums[3]),
    )


def _cut(base: torch.Tensor, tuned: torch.Tensor, bits: torch.Tensor) -> list[tuple[np.ndarray, ...]]:
    """Cut two tensors, as integers, and the bytes of their bits into runs of blocks, one per thread."""
    old, new, out = bits_view(base).numpy(), bits_view(tuned).numpy(), bits.numpy()
    parts = split(-(-old.size // _BLOCK), 1 if old.size < _SMALL else None)
    return [
        (
            old[start * _BLOCK : stop * _BLOCK],
            new[start * _BLOCK : stop * _BLOCK],
            out[start * _BLOCK // 8 : stop * _BLOCK // 8],
        )
        for start, stop in parts
    ]


def _as_float32(values: Sequence[float]) -> np.ndarray:
    # As torch compares a float32 tensor with a Python number: rounded, and infinite where it is too large.
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float64).astype(np.float32)


@intrinsic
def _unequal_word(typing_context: Any, left: Any, right: Any, start: Any) -> Any:
    """Return a uint64 whose bit `i` says whether element `start + i` differs in two contiguous integer arrays."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        vectors = []
        for kind, value in zip(signature.args[:2], arguments[:2], strict=True):
            width = context.get_data_type(kind.dtype)
            data = context.make_array(kind)(context, builder, value).data
            pointer = builder.bitcast(builder.gep(data, [arguments[2]]), ir.VectorType(width, 64).as_pointer())
            vectors.append(builder.load(pointer, align=kind.dtype.bitwidth // 8))
        return builder.bitcast(builder.icmp_unsigned("!=", *vectors), ir.IntType(64))

    return types.uint64(left, right, types.int64), generate


@compiled
def _count(words: Any) -> Any:
    count = np.uint64(0)
    for i in range(words.size):
        count += popcount(words[i])
    return np.int64(count)


@compiled
def _changed(base: Any, tuned: Any, bits: Any) -> Any:
    """Mark in (ceil(n / 8),) `bits` which of (n,) integers differ; return how many do."""
    whole = base.size // 64
    words = bits[: 8 * whole].view(np.uint64)
    count = np.uint64(0)
    for number in range(whole):
        word = _unequal_word(base, tuned, 64 * number)
        words[number] = word
        count += popcount(word)
    bits[8 * whole :] = 0
    for i in range(64 * whole, base.size):
        differs = np.uint64(base[i] != tuned[i])
        bits[i // 8] |= np.uint8(differs << np.uint64(i % 8))
        count += differs
    return np.int64(count)


@compiled
def _widen(source: Any, kind: int, out: Any) -> None:
    """Read (n,) weights, given as integers, as float32."""
    if kind == _FLOAT16:
        for i in range(source.size):
            out[i] = half_to_float(np.uint16(source[i]))
    else:
        bits = out.view(np.uint32)
        shift = np.uint32(16 if kind == _BFLOAT16 else 0)
        for i in range(source.size):
            bits[i] = np.uint32(source[i]) << shift


@compiled
def _changed_beyond(base: Any, tuned: Any, bits: Any, kind: int, is_relative: bool, tolerance: Any) -> int:
    """Mark which of (n,) weights, given as integers, differ by more than a tolerance; return how many do."""
    old, new = np.empty(_BLOCK, dtype=np.float32), np.empty(_BLOCK, dtype=np.float32)
    flags, unset = np.empty(_BLOCK, dtype=np.uint8), np.zeros(_BLOCK, dtype=np.uint8)
    absolute = np.float32(0.0) if is_relative else tolerance
    relative = tolerance if is_relative else np.float32(0.0)
    count = 0
    for first in range(0, base.size, _BLOCK):
        n = min(_BLOCK, base.size - first)
        _widen(base[first : first + n], kind, old)
        _widen(tuned[first : first + n], kind, new)
        for i in range(n):
            threshold = abs(old[i]) * relative if is_relative else absolute
            # Equal infinities differ by NaN, and so does a NaN on one side: only the second is a change.
            is_unequal = (old[i] != new[i]) & ((old[i] == old[i]) | (new[i] == new[i]))
            flags[i] = is_unequal & (not abs(new[i] - old[i]) <= threshold)
        count += _changed(flags[:n], unset[:n], bits[first // 8 : (first + n + 7) // 8])
    return count


@compiled
def _compare(
    base: Any, tuned: Any, bits: Any, offset: int, kind: int, thresholds: Any
) -> tuple[int, Any, tuple[Any, Any, Any, Any]]:
    """Return the count of changed weights, of those beyond each threshold, and the sums of both fingerprints."""
    old, new = np.empty(_BLOCK, dtype=np.float32), np.empty(_BLOCK, dtype=np.float32)
    beyond = np.zeros(thresholds.size, dtype=np.int64)
    count = 0
    zero = np.uint64(0)
    first_sum, second_sum, third_sum, fourth_sum = zero, zero, zero, zero
    for first in range(0, base.size, _BLOCK):
        base_block, tuned_block = base[first : first + _BLOCK], tuned[first : first + _BLOCK]
        n = base_block.size
        sums = sums_of_pair(base_block, tuned_block, offset + first)
        first_sum, second_sum = first_sum + sums[0], second_sum + sums[1]
        third_sum, fourth_sum = third_sum + sums[2], fourth_sum + sums[3]
        changed = _changed(base_block, tuned_block, bits[first // 8 : (first + n + 7) // 8])
        if changed:
            count += changed
            _widen(base_block, kind, old)
            _widen(tuned_block, kind, new)
            _to_distance(old[:n], new[:n])
            for which in range(thresholds.size):
                beyond[which] += _count_above(old[:n], thresholds[which])
    return count, beyond, (first_sum, second_sum, third_sum, fourth_sum)


@compiled
def _to_distance(old: Any, new: Any) -> None:
    """Replace (n,) `old` by its distance from `new`: infinite where one side is NaN, 0 where both are."""
    for i in range(old.size):
        distance = abs(new[i] - old[i])
        if distance != distance:
            # One NaN, two of them, or twice the same infinity.
            distance = _INFINITY if (old[i] != old[i]) != (new[i] != new[i]) else np.float32(0.0)
        old[i] = distance


@compiled
def _count_above(values: Any, threshold: Any) -> Any:
    count = np.int32(0)
    for i in range(values.size):
        # Without the cast numba widens the sum to 64 bits, and half as many lanes fit a vector.
        count = np.int32(count + np.int32(values[i] > threshold))
    return np.int64(count)
