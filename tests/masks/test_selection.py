"""Choosing the lowest keys: exact counts, ties by the seed, and nothing that depends on the pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import subnet_kernels
from subnet_ft.errors import MaskError
from subnet_ft.masks.mask import TensorMask
from subnet_ft.masks.selection import generator_of, lowest, lowest_overall, magnitude_keys, tiles


def test_lowest_takes_a_part_of_equal_keys() -> None:
    pairs = {
        tuple(lowest(np.array([3, 1, 1, 1]), 2, generator_of(seed, "w")).nonzero().flatten().tolist())
        for seed in range(50)
    }
    assert pairs == {(1, 2), (1, 3), (2, 3)}


@pytest.mark.parametrize("size", [1, 63, 1000])
@pytest.mark.parametrize("values", [1, 5, 1 << 20])
def test_lowest_is_a_sort(size: int, values: int) -> None:
    rng = np.random.default_rng(size)
    keys = rng.integers(values, size=size, dtype=np.uint32)
    for count in sorted({0, 1, size // 3, size}):
        chosen = lowest(keys, count, rng).numpy()
        assert np.array_equal(np.sort(keys[chosen]), np.sort(keys)[:count])


def test_magnitude_keys_order_every_bfloat16_by_magnitude() -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()]
    order = torch.from_numpy(magnitude_keys(finite).astype(np.int64))
    assert torch.equal(order.argsort(stable=True), finite.float().abs().argsort(stable=True))
    reverse = torch.from_numpy(magnitude_keys(finite, largest_first=True).astype(np.int64))
    assert torch.equal(reverse.argsort(stable=True), (-finite.float().abs()).argsort(stable=True))
    nan, infinity = magnitude_keys(torch.tensor([torch.nan, -torch.inf])).tolist()
    assert nan > infinity == magnitude_keys(every).max(initial=0, where=~every.isnan().numpy())


SHAPES = {"a": (40, 50), "b": (7,), "c": (3, 333), "empty": (0,)}


def keys_of(seed: int, num_keys: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(num_keys, size=int(np.prod(shape))) for name, shape in SHAPES.items()}


def overall(
    keys: dict[str, np.ndarray], count: int, num_keys: int, *, seed: int = 0, size: int = 1 << 20, purpose: str = ""
) -> dict[str, TensorMask]:
    def pieces():  # type: ignore[no-untyped-def]
        for name, values in keys.items():
            for tile in tiles(values.size, size):
                yield name, values[tile]

    return lowest_overall(pieces, SHAPES, count, num_keys=num_keys, seed=seed, purpose=purpose)


def dense(masks: dict[str, TensorMask]) -> dict[str, np.ndarray]:
    return {
        name: subnet_kernels.unpack_bits(mask.full_bits(), mask.num_elements).numpy() for name, mask in masks.items()
    }


@pytest.mark.parametrize("num_keys", [1, 3, 300])
@pytest.mark.parametrize("count", [0, 1, 700, 3005, 3006])
def test_lowest_overall_is_a_sort_over_all_tensors(num_keys: int, count: int) -> None:
    keys = keys_of(1, num_keys)
    masks = overall(keys, count, num_keys)
    assert {name: mask.shape for name, mask in masks.items()} == SHAPES
    chosen = np.concatenate([keys[name][bits] for name, bits in dense(masks).items()])
    assert sum(mask.count for mask in masks.values()) == count
    assert np.array_equal(np.sort(chosen), np.sort(np.concatenate(list(keys.values())))[:count])


@pytest.mark.parametrize("bits", [1, 12])
def test_lowest_overall_orders_by_key_then_by_each_tensors_own_numbers(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subnet_ft.masks.selection._DRAWN_BITS", bits)
    keys = keys_of(1, 3)
    draws = {name: generator_of(7, name).integers(1 << 32, size=keys[name].size, dtype=np.uint32) for name in SHAPES}
    order = np.lexsort([np.concatenate(list(values.values())) for values in (draws, keys)])
    expected = np.zeros(order.size, dtype=bool)
    expected[order[:1501]] = True
    found = dense(overall(keys, 1501, 3, seed=7))
    assert np.array_equal(np.concatenate(list(found.values())), expected)


def test_lowest_overall_does_not_depend_on_the_pieces() -> None:
    keys = keys_of(1, 3)
    whole, cut = (dense(overall(keys, 1500, 3, size=size)) for size in (1 << 20, 8))
    assert all(np.array_equal(whole[name], cut[name]) for name in SHAPES)
    for other in (overall(keys, 1500, 3, seed=1), overall(keys, 1500, 3, purpose="other")):
        assert not np.array_equal(whole["a"], dense(other)["a"])


def test_lowest_overall_reaches_every_tied_weight_equally_often() -> None:
    keys = {name: np.zeros(int(np.prod(shape)), dtype=np.int64) for name, shape in SHAPES.items()}
    keys["b"][:] = 1
    hits = np.zeros(2000)
    for seed in range(400):
        masks = dense(overall(keys, 600, 2, seed=seed))
        hits += masks["a"]
        assert not masks["b"].any()
    # Each count is binomial(400, 600 / 2999): standard deviation 8; 5 of them is one false alarm in 900 runs of 2,000.
    assert np.abs(hits - 400 * 600 / 2999).max() < 5.5 * 8


def test_lowest_overall_asks_how_many_when_it_knows_the_keys() -> None:
    keys = keys_of(1, 3)
    seen = []

    def pieces():  # type: ignore[no-untyped-def]
        yield from keys.items()

    def count(histogram: np.ndarray) -> int:
        seen.append(histogram.tolist())
        return int(histogram[:2].sum())

    masks = dense(lowest_overall(pieces, SHAPES, count, num_keys=3, seed=0))
    assert seen == [np.bincount(np.concatenate(list(keys.values()))).tolist()]
    assert all(np.array_equal(masks[name], keys[name] < 2) for name in SHAPES)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(MaskError, match="`seed` must be >= 0, got -1"):
        generator_of(-1, "w")
