"""The drift that changes a stored weight, against casts of drifted masters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from subnet_ft.masks.spacing import NUM_REACHES, reach_keys, reach_of


def reaches(weights: torch.Tensor) -> torch.Tensor:
    return torch.tensor([reach_of(int(key)) for key in reach_keys(weights)], dtype=torch.float64)


def test_reach_keys_of_the_docstring() -> None:
    values = torch.tensor([1.0078125, 1.5, -1.9, 1.0], dtype=torch.bfloat16)
    assert reaches(values).tolist() == [2**-8, 2**-8, 2**-8, 2**-9]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_flips_just_beyond_its_reach_and_not_before(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    weights = every[every.isfinite() & (every.abs() < torch.finfo(dtype).max)]
    reach = reaches(weights)
    for part, flips in ((0.99, False), (1.01, True)):
        # In float64, rounded to float32 once: the smallest bfloat16 has a reach that float32 holds as well.
        drifted = [(weights.double() + sign * part * reach).to(dtype) for sign in (1, -1)]
        changed = (drifted[0] != weights) | (drifted[1] != weights)
        assert bool(changed.all()) is flips
        assert bool(changed.any()) is flips


def test_keys_of_several_dtypes_compare() -> None:
    values = torch.tensor([3.0, 1.5, 0.7])
    for dtype, bits in ((torch.float32, 23), (torch.float16, 10), (torch.bfloat16, 7)):
        assert reaches(values.to(dtype)).tolist() == [2.0**-bits, 2.0 ** -(bits + 1), 2.0 ** -(bits + 2)]


def test_keys_are_below_their_number_and_what_is_not_finite_comes_last() -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    keys = reach_keys(every)
    assert keys.min() >= 0
    assert np.array_equal(keys == NUM_REACHES - 1, ~every.isfinite().numpy())
    assert reach_of(NUM_REACHES - 1) == float("inf")
