"""Choosing the highest scores of a model: the order of float32, exact counts, ties by the seed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import subnet_kernels
from subnet_ft.masks.fine_selection import ScorePieces, highest_overall
from subnet_ft.masks.mask import TensorMask

SHAPES = {"a": (40, 30), "b": (7,), "c": (1000,)}


def pieces_of(scores: dict[str, torch.Tensor], size: int = 64) -> Callable[[], ScorePieces]:
    return lambda: ((name, piece) for name, flat in scores.items() for piece in flat.split(size))


def chosen(masks: dict[str, TensorMask]) -> torch.Tensor:
    return torch.cat([subnet_kernels.unpack_bits(mask.full_bits(), mask.num_elements) for mask in masks.values()])


def random_scores(seed: int = 0, exponent: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(math.prod(shape), generator=generator) ** exponent for name, shape in SHAPES.items()}


@pytest.mark.parametrize("exponent", [1.0, 0.001, 20.0])
@pytest.mark.parametrize("count", [0, 1, 500, 2206, 2207])
def test_highest_overall_is_a_sort_of_float32(count: int, exponent: float) -> None:
    scores = random_scores(exponent=exponent)
    flat = torch.cat(list(scores.values()))
    found = chosen(highest_overall(pieces_of(scores), SHAPES, count, seed=0))
    assert int(found.sum()) == count
    assert torch.equal(flat[found].sort().values, flat.sort().values[len(flat) - count :])


def test_highest_overall_takes_a_part_of_equal_scores_by_the_seed() -> None:
    scores = {"a": torch.tensor([0.5, 0.1]), "b": torch.tensor([0.3, 0.3])}
    shapes = {"a": (2,), "b": (2,)}
    found = {tuple(chosen(highest_overall(pieces_of(scores), shapes, 2, seed=seed)).tolist()) for seed in range(20)}
    assert found == {(True, False, True, False), (True, False, False, True)}


def test_highest_overall_does_not_depend_on_the_pieces() -> None:
    scores = {name: (flat * 8).floor() for name, flat in random_scores().items()}
    masks = [highest_overall(pieces_of(scores, size), SHAPES, 700, seed=3) for size in (8, 64, 4096)]
    assert torch.equal(chosen(masks[0]), chosen(masks[1]))
    assert torch.equal(chosen(masks[0]), chosen(masks[2]))


def test_highest_overall_takes_nothing_of_a_tensor_without_scores() -> None:
    scores = random_scores()
    del scores["c"]
    masks = highest_overall(pieces_of(scores), SHAPES, 300, seed=0)
    assert list(masks) == list(SHAPES)
    assert (masks["a"].count + masks["b"].count, masks["c"].count) == (300, 0)


def test_highest_overall_lets_the_scores_say_the_count() -> None:
    scores = random_scores()

    def above(levels: np.ndarray, numbers: np.ndarray) -> int:
        assert (np.diff(levels[numbers > 0]) < 0).all()
        assert numbers.sum() == 2207
        total = sum(flat.double().sum().item() for flat in scores.values())
        assert float(levels.astype(np.float64) @ numbers) == pytest.approx(total, rel=2**-12)
        return int(numbers[levels >= 0.75].sum())

    masks = highest_overall(pieces_of(scores), SHAPES, above, seed=0)
    assert torch.equal(chosen(masks), torch.cat(list(scores.values())) >= 0.75)
