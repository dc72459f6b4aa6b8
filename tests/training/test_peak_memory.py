"""Peaks of several runs in one process: each its own."""

from __future__ import annotations

import sys

import pytest
import torch

from subnet_ft.training.peak_memory import PeakMemory

MEGABYTE = 1 << 20

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="resident memory is read from Linux's /proc"
)


def peak(megabytes: int) -> int:
    """Hold so many megabytes inside the block, in pieces that the C library takes from its heap."""
    with PeakMemory() as measured:
        # Between the pieces something small stays, so that what is freed lies in the middle of the heap.
        pieces = [(torch.ones(MEGABYTE // 64), KEPT.append(torch.ones(8))) for _ in range(16 * megabytes)]
        del pieces
    return measured.measured["peak_rss"]


KEPT: list[torch.Tensor] = []


def test_peak_memory_does_not_count_what_an_earlier_block_freed() -> None:
    first, second = peak(400), peak(1)
    assert first - second > 300 * MEGABYTE


def test_peak_memory_counts_what_is_held_inside() -> None:
    assert peak(400) - peak(1) > 300 * MEGABYTE
