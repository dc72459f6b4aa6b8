"""Random masks of one tensor: their counts, and that they are random."""

from __future__ import annotations

import pytest
import torch
from helpers import random_bits

import subnet_ft.masks.draws as draws
import subnet_kernels
from subnet_ft.errors import MaskError
from subnet_ft.masks import SubnetMask, TensorMask
from subnet_ft.masks.draws import drawn_like, drawn_outside
from subnet_ft.masks.magnitude import magnitude_bins


def tensor_mask(dense: torch.Tensor) -> TensorMask:
    return SubnetMask.from_dense({"w": dense}).tensors["w"]


def dense(mask: TensorMask) -> torch.Tensor:
    return subnet_kernels.unpack_bits(mask.full_bits(), mask.num_elements)


def weights(size: int = 20_000) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("tile", [1 << 20, 1000])
def test_drawn_like_with_weights_has_the_count_of_every_bin(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "_TILE", tile)
    weight = weights()
    chosen = (weight.float().abs() < 0.3) & random_bits(weight.numel(), 0.7, 5)
    mask = tensor_mask(chosen)
    matched, uniform = dense(drawn_like(mask, "w", 3, weight)), dense(drawn_like(mask, "w", 3))
    assert not torch.equal(matched, chosen)
    assert uniform.sum() == chosen.sum()
    bins = torch.from_numpy(magnitude_bins(weight)).long()
    counts = [torch.bincount(bins[bits], minlength=2048) for bits in (chosen, matched, uniform)]
    assert torch.equal(counts[0], counts[1])
    assert not torch.equal(counts[0], counts[2])


def test_drawn_like_reaches_every_weight_equally_often() -> None:
    mask = tensor_mask(torch.arange(30) < 6)
    hits = sum(dense(drawn_like(mask, "w", seed)).float() for seed in range(2000))
    # Each of 30 counts is binomial(2000, 0.2): standard deviation 17.9; 5 of them is one false alarm in 60,000 runs.
    assert (hits - 400).abs().max() < 5 * 17.9


def test_drawn_like_over_several_tiles_is_not_stratified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "_TILE", 10)
    mask = tensor_mask(torch.arange(30) < 6)
    in_first_tile = [int(dense(drawn_like(mask, "w", seed))[:10].sum()) for seed in range(300)]
    assert {0, 1, 2, 3, 4} <= set(in_first_tile)
    assert abs(sum(in_first_tile) / 300 - 2.0) < 5 * (1.05 / 300**0.5)


def test_drawn_outside_reaches_every_weight_outside_equally_often() -> None:
    chosen = random_bits(30, 0.3, 1)
    mask = tensor_mask(chosen)
    hits = torch.zeros(30)
    for seed in range(2000):
        drawn = dense(drawn_outside(mask, "w", seed))
        assert drawn.sum() == mask.count
        hits += drawn
    assert (hits[chosen] == 0).all()
    share = mask.count / (30 - mask.count)
    deviation = (2000 * share * (1 - share)) ** 0.5
    assert 0.1 < share < 0.9
    assert (hits[~chosen] - 2000 * share).abs().max() < 5 * deviation


def test_drawn_outside_takes_up_to_half_of_a_tensor() -> None:
    half = torch.arange(1000) % 2 == 0
    assert torch.equal(dense(drawn_outside(tensor_mask(half), "w", 0)), ~half)
    assert drawn_outside(tensor_mask(torch.zeros(10, dtype=torch.bool)), "w", 0).count == 0
    half[1] = True
    with pytest.raises(MaskError, match="holds 501 of the 1,000 weights of `w`, so there are only 499 outside"):
        drawn_outside(tensor_mask(half), "w", 0)
    with pytest.raises(MaskError, match="holds 3 of the 5 weights of `w`, so there are only 2 outside"):
        drawn_outside(tensor_mask(torch.arange(5) < 3), "w", 0)


def test_drawn_like_draws_two_kinds_of_one_seed_independently() -> None:
    """Controls that share an order of draws would overlap beyond chance, and their runs would look alike."""
    weight = weights(200_000)
    mask = tensor_mask(random_bits(weight.numel(), 0.2, 5))
    matched, uniform = dense(drawn_like(mask, "w", 0, weight)), dense(drawn_like(mask, "w", 0))
    assert (matched & uniform).sum() / mask.count == pytest.approx(0.2, abs=0.01)
