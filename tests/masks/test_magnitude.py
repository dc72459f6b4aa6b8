"""Bins of |w|."""

from __future__ import annotations

import pytest
import torch

from subnet_ft.masks.magnitude import NUM_BINS, magnitude_bins


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_magnitude_bins_of_the_docstring(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 1.1, 1.125, -2.0, 0.0, -0.0], dtype=dtype)
    assert magnitude_bins(values).tolist() == [1016, 1016, 1017, 1024, 0, 0]


def test_magnitude_bins_of_every_bfloat16_are_those_of_its_float32() -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    bins = magnitude_bins(every)
    assert (bins == magnitude_bins(every.float())).all()
    assert bins.min() >= 0
    assert bins.max() == NUM_BINS - 1
