"""Both ways to move the masked elements of a block, for whichever CPU runs the tests, against boolean indexing."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import random_bits, same_bits

pytest.importorskip("numba")

from subnet_kernels import pack_bits
from subnet_kernels.cpu import avx512, blocks, moves, moves_avx512
from subnet_kernels.cpu.moves import MAX_BLOCK, ROOM, SCRATCH

WAYS = [
    moves,
    pytest.param(
        moves_avx512, marks=pytest.mark.skipif(not avx512.is_available(), reason="this CPU has no AVX-512 VBMI2")
    ),
]
BLOCKS = [(0, 1), (0, 31), (0, 32), (64, 100), (1024, 1024 + MAX_BLOCK), (0, MAX_BLOCK - 32), (2048, 3999)]
DENSITIES = (0.0, 0.002, 0.1, 0.5, 1.0)


def buffers(mask: torch.Tensor, first: int, last: int, way: ModuleType) -> tuple[torch.Tensor, np.ndarray, int]:
    bits, positions = pack_bits(mask), np.empty(ROOM, dtype=np.int32)
    return bits, positions, way.find(bits.data_ptr(), first, last, positions)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_take_and_put_move_the_masked_elements_of_a_block(way: ModuleType, dtype: torch.dtype) -> None:
    is_wide = dtype == torch.int32
    take, put = (way.take32, way.put32) if is_wide else (way.take16, way.put16)
    for (first, last), density in itertools.product(BLOCKS, DENSITIES):
        mask = random_bits(last, density, seed=last)
        dense = torch.arange(last).to(dtype)
        bits, positions, n = buffers(mask, first, last, way)
        assert n == int(mask[first:].sum())
        buffer = np.zeros(ROOM, dtype=np.float32 if is_wide else np.uint16)
        take(dense.data_ptr(), bits.data_ptr(), first, last, positions, buffer, n)
        values = torch.from_numpy(buffer.view(np.int32 if is_wide else np.int16))
        assert same_bits(values[:n], dense[first:][mask[first:]])
        values[:n] += 7
        expected = dense.clone()
        expected[first:][mask[first:]] += 7
        put(dense.data_ptr(), bits.data_ptr(), first, last, positions, buffer, n)
        assert same_bits(dense, expected), (first, last, density)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_put_changed16_writes_only_what_changed(way: ModuleType, share: float) -> None:
    for (first, last), density in itertools.product(BLOCKS, DENSITIES):
        mask = random_bits(last, density, seed=last)
        # Not what `before` says, so that a write of an unchanged element shows.
        dense = torch.full((last,), -1, dtype=torch.int16)
        bits, positions, n = buffers(mask, first, last, way)
        before, after = np.zeros(ROOM, dtype=np.uint16), np.ones(ROOM, dtype=np.uint16)
        changed = random_bits(n, share, seed=n)
        after[:n] = changed.numpy()
        scratch = np.full(SCRATCH, 2**64 - 1, dtype=np.uint64)
        way.put_changed16(
            dense.data_ptr(), bits.data_ptr(), first, last, positions, before, after, scratch, n
        )  # fmt: skip
        expected = torch.full((last,), -1, dtype=torch.int16)
        expected[first:][mask[first:]] = torch.where(changed, 1, -1).to(torch.int16)
        assert same_bits(dense, expected), (first, last, density)


@pytest.mark.skipif(not avx512.is_available(), reason="this CPU has no AVX-512 VBMI2")
def test_blocks_take_the_vectors_where_the_cpu_has_them() -> None:
    assert blocks.take16 is moves_avx512.take16


@pytest.mark.slow
@pytest.mark.skipif(not avx512.is_available(), reason="the other tests run the portable form here already")
def test_the_portable_form_passes_the_tests_of_all_ops() -> None:
    """Compiles for a CPU without AVX-512, in a process of its own: the choice is made at import."""
    here = Path(__file__).parent
    environment = os.environ | {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+popcnt,+sse4.2,+ssse3",
    }
    check = "from subnet_kernels.cpu import blocks, moves; assert blocks.take16 is moves.take16"
    path = str(here.parents[1] / "kernels")
    subprocess.run([sys.executable, "-c", check], env=environment | {"PYTHONPATH": path}, check=True)
    files = [str(here / f"test_{name}.py") for name in ("adamw", "sgd", "compact", "copies")]
    command = [sys.executable, "-Im", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, cwd=here.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
