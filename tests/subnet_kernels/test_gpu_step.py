"""The step kernel on one tile of a tensor of more than 2**31 elements, in memory that is reserved but never filled."""

from __future__ import annotations

import mmap
import sys

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE, IS_INTERPRETED

from subnet_kernels import SEGMENT_TILES, TILE_SIZE
from subnet_kernels.gpu import step
from subnet_kernels.gpu.launch import launch

TILE = 2**31 // TILE_SIZE  # the tile that begins at element 2**31, in the third segment
SLOT = 2**31 + 5
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python names since 3.13 only


def far(dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """Return 2**33 zeros that take no memory, and the address of the one in the middle.

    Whoever computes an offset in 32 bits lands in the other half: a wrong number, not a crash.
    """
    size = dtype.itemsize << 33
    buffer = torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | NO_RESERVE), dtype=dtype)
    return buffer, buffer.data_ptr() + (dtype.itemsize << 32)


@pytest.mark.skipif(not IS_INTERPRETED or sys.platform != "linux", reason="needs the interpreter on Linux")
def test_step_slots_finds_elements_and_slots_past_2_to_the_31() -> None:
    param, param_address = far(torch.int16)
    grad, grad_address = far(torch.float32)
    buffer, buffer_address = far(torch.float32)
    master, master_address = far(torch.int16)
    bits = torch.zeros((TILE + 1) * TILE_SIZE // 8, dtype=torch.uint8)
    bits[TILE * TILE_SIZE // 8] = 0b101
    offsets = torch.zeros(TILE + 1, dtype=torch.int32)
    bases = torch.tensor([0, 2**30, SLOT], dtype=torch.int64)
    assert TILE // SEGMENT_TILES == 2

    middle = 1 << 32
    param[middle + 2**31 : middle + 2**31 + 3] = torch.tensor([0x3F80, 0x1111, 0x4000], dtype=torch.int16)
    grad[middle + SLOT : middle + SLOT + 2] = torch.tensor([0.5, 1.0])
    table = torch.zeros((1, step.COLUMNS), dtype=torch.int64)
    addresses = (
        param_address, bits.data_ptr(), offsets.data_ptr(), bases.data_ptr(), grad_address, buffer_address, 0,
        master_address,
    )  # fmt: skip
    table[0, : len(addresses)] = torch.tensor(np.array(addresses, dtype=np.uint64).astype(np.int64))
    table.view(torch.float32)[0, 2 * step.SCALARS : 2 * step.SCALARS + 3] = torch.tensor([0.0, 0.9, 0.5])
    launch(
        step.step_slots, 1, torch.tensor([[0, TILE]], dtype=torch.int32), table, torch.ones(()),
        device=DEVICE, is_slotwise=True,
        RULE="momentum", PARAM_KIND="bfloat16", GRAD_KIND="compact", MASTER_KIND="remainder", IS_ROUNDED=False,
    )  # fmt: skip
    written = param[middle + 2**31 : middle + 2**31 + 3].view(torch.bfloat16)
    assert written[[0, 2]].tolist() == [0.75, 1.5]
    assert int(param[middle + 2**31 + 1]) == 0x1111
    assert buffer[middle + SLOT : middle + SLOT + 2].tolist() == [0.5, 1.0]
    assert master[middle + SLOT : middle + SLOT + 2].tolist() == [0, 0]
