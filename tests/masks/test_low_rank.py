"""Entries of low-rank approximations, against torch's SVD and where they were planted."""

from __future__ import annotations

import pytest
import torch

import subnet_ft.masks.low_rank as low_rank
from subnet_ft.errors import MaskError
from subnet_ft.masks.low_rank import low_rank_magnitudes


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_svd(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).abs().float()


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (50, 50)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [1 << 20, 100])
def test_low_rank_magnitudes_are_those_of_the_svd(
    shape: tuple[int, int], dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "_BLOCK", block)
    weight = normal(*shape).to(dtype)
    for rank in (1, 5, 39):
        found = low_rank_magnitudes("w", weight, rank)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, by_svd(weight, rank), rtol=1.2e-7, atol=1e-12)


def test_low_rank_magnitudes_find_a_planted_matrix_under_noise() -> None:
    planted = torch.zeros(64, 96)
    planted[10:20, 30:50] = 1.0  # rank 1
    found = low_rank_magnitudes("w", planted + 0.1 * normal(64, 96), 1)
    top = torch.zeros(64 * 96, dtype=torch.bool)
    top[found.flatten().argsort(descending=True)[:200]] = True
    assert torch.equal(top.view(64, 96), planted > 0)


def test_low_rank_magnitudes_default_to_a_32nd_of_the_smaller_side() -> None:
    weight = normal(96, 130)
    assert torch.equal(low_rank_magnitudes("w", weight), low_rank_magnitudes("w", weight, 3))
    assert torch.equal(low_rank_magnitudes("w", weight[:31]), low_rank_magnitudes("w", weight[:31], 1))


def test_low_rank_magnitudes_take_each_matrix_of_a_stack_by_itself() -> None:
    stack = normal(3, 20, 30)
    found = low_rank_magnitudes("w", stack, 2)
    for matrix, expected in zip(found, stack, strict=True):
        torch.testing.assert_close(matrix, by_svd(expected, 2), rtol=1.2e-7, atol=1e-12)


def test_a_vector_and_a_matrix_of_smaller_rank_are_their_own_approximation() -> None:
    for weight in (normal(50), normal(1, 50), normal(4, 50), torch.tensor(-2.0)):
        assert torch.equal(low_rank_magnitudes("w", weight, 4), weight.abs())


def test_low_rank_magnitudes_do_not_depend_on_the_number_of_threads() -> None:
    weight = normal(300, 200).bfloat16()
    torch.set_num_threads(2)
    two = low_rank_magnitudes("w", weight)
    torch.set_num_threads(1)
    assert torch.equal(two, low_rank_magnitudes("w", weight))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_low_rank_magnitudes_refuse_what_is_not_finite(value: float) -> None:
    weight = normal(40, 40)
    weight[3, 4] = value
    with pytest.raises(MaskError, match="`w` has weights that are NaN or infinite"):
        low_rank_magnitudes("w", weight)
