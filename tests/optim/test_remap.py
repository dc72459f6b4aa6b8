"""Compact values under another mask."""

from __future__ import annotations

import pytest
import torch
from helpers import random_bits, random_mask, same_bits, set_gradients, small_model
from masked_optimizers import BUILDERS, differing, state_of

from subnet_ft.optim import remap as remapping
from subnet_kernels import BitMask, pack_bits

CHUNKS = (8, 64, remapping._CHUNK)


def index(bits: torch.Tensor) -> BitMask:
    return BitMask.from_bits(pack_bits(bits), bits.numel())


def test_remap_example() -> None:
    old, new = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    into = torch.zeros(2)
    assert remapping.remap(torch.tensor([5.0, 6.0]), index(old), index(new), into=into) is into
    assert into.tolist() == [6.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("size", [1, 7, 8, 63, 64, 65, 1000, 1025])
def test_remap_is_what_dense_tensors_say(
    size: int, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remapping, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(size)
    for number, (old_density, new_density) in enumerate([(0.3, 0.3), (0.0, 0.5), (0.5, 0.0), (1.0, 0.2), (0.2, 1.0)]):
        old, new = random_bits(size, old_density, number), random_bits(size, new_density, 100 + number)
        values, fresh = (torch.randint(-999, 999, (size,), generator=generator).to(dtype) for _ in range(2))
        expected = torch.where(old, values, fresh)[new]
        found = remapping.remap(values[old], index(old), index(new), into=fresh[new])
        assert same_bits(found, expected)


def test_remap_keeps_the_bits_of_nan_and_of_minus_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remapping, "_CHUNK", 8)
    values = torch.tensor([float("nan"), -0.0] * 10)
    values.view(torch.int32)[0] |= 0x155
    old, new = random_bits(20, 1.0), random_bits(20, 0.5)
    found = remapping.remap(values, index(old), index(new), into=torch.zeros(int(new.sum())))
    assert same_bits(found, values[new])


@pytest.mark.parametrize("kind", BUILDERS)
def test_set_mask_gives_the_same_bits_whatever_the_chunk(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for chunk in CHUNKS:
        monkeypatch.setattr(remapping, "_CHUNK", chunk)
        model = small_model(torch.bfloat16)
        optimizer = BUILDERS[kind](model.named_parameters(), random_mask(model, 0.4))
        for step in range(2):
            set_gradients(model, step)
            optimizer.step()
        optimizer.set_mask(random_mask(model, 0.5, seed=5))
        states.append(state_of(optimizer))
    assert differing(states[0], states[1]) == differing(states[0], states[2]) == []
