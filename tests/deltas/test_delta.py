"""`Delta` in memory: parts that contradict each other are refused, pieces are written in any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_checkpoints import random_case, record
from helpers import same_bits

import subnet_kernels
from subnet_ft.deltas import Delta, TensorDelta
from subnet_ft.errors import DeltaError
from subnet_ft.masks import ModelRecord

NAME = "w"
BASE = record({NAME: torch.zeros(2, 5)})
BITS = torch.tensor([2, 1], dtype=torch.uint8)
VALUES = torch.tensor([2.5, -1.0])


def delta(
    bits: torch.Tensor = BITS, values: torch.Tensor = VALUES, shape: tuple[int, ...] = (2, 5), **fields: Any
) -> Delta:
    arguments = {"tensors": {NAME: TensorDelta(bits, values, shape)}, "base": BASE, "result": BASE.fingerprints}
    return Delta(**(arguments | fields))


def test_delta_counts_what_it_changes() -> None:
    found = delta()
    assert (found.num_values, found.num_parameters) == (2, 10)
    assert found.mask[NAME].view(-1).nonzero().view(-1).tolist() == [1, 8]
    assert repr(found) == "Delta(2 of 10 weights of `a base`)"
    assert found.entries[NAME].count == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    {
        "short bits": ({"bits": BITS[:1]}, r"uint8 bits of shape \(2,\)"),
        "long bits": ({"bits": torch.zeros(3, dtype=torch.uint8)}, r"uint8 bits of shape \(2,\)"),
        "bits of another dtype": ({"bits": BITS.int()}, r"are torch.int32"),
        "bits without values": ({"values": torch.empty(0)}, r"with 0 new values has uint8 bits of shape \(0,\)"),
        "a matrix of values": ({"values": VALUES.view(1, 2)}, "in one dimension"),
        "more values than weights": ({"bits": BITS[:1], "values": torch.zeros(3), "shape": (2,)}, "at most 2"),
        "values of another dtype": ({"values": VALUES.bfloat16()}, "are bfloat16 but its base is float32"),
        "no result": ({"result": {}}, "fingerprints of its result differ in `w`"),
        "a base of another model": ({"base": record({"x": torch.zeros(1)})}, "dtypes of its base differ in `w`"),
        "a tensor less": ({"tensors": {}}, "dtypes of its base differ in `w`"),
    }.values(),
)
def test_delta_refuses_parts_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DeltaError, match=message):
        delta(**fields)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64], ids=str
)
def test_delta_refuses_dtypes_that_no_file_holds(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    base = ModelRecord("a base", None, {NAME: name}, {NAME: "0" * 32})
    with pytest.raises(DeltaError, match=f"stores `w` in {name}; a delta holds bfloat16, float16, float32 only"):
        delta(values=VALUES.to(dtype), base=base)


@pytest.mark.parametrize("size", [8, 16, 64, 1 << 20])
def test_write_gives_the_tuned_tensor_in_pieces_of_every_size(size: int) -> None:
    changed = 0
    for seed in range(40):
        base, tuned, found = random_case(seed)
        for name, tensor in found.tensors.items():
            flat, used = base[name].clone().view(-1), 0
            for start in range(0, flat.numel(), size):
                used += tensor.write(flat[start : start + size], start, used)
            assert used == tensor.count
            assert same_bits(flat.view(tensor.shape), tuned[name])
            changed += used
    assert changed > 500


def test_mask_and_full_bits_mark_what_changes() -> None:
    for seed in range(40):
        base, tuned, found = random_case(seed)
        for name, tensor in found.tensors.items():
            bits, count = subnet_kernels.changed_bits(base[name].view(-1), tuned[name].view(-1))
            assert torch.equal(tensor.full_bits(), bits)
            assert found.mask.tensors[name].count == count == tensor.count
