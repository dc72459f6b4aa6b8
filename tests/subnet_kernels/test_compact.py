"""The op compact: its example, dense indexing, and the compiled form against the reference bit for bit."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from helpers import DENSITIES, SIZES, same_bits
from update_cases import CLUSTERED, at_page_end, bit_mask, chosen, gradient, values

from subnet_kernels import compact, reference

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
MANY = 1 << 21  # elements, so many that several threads share them
CASES = [*itertools.product(SIZES, DENSITIES), (5000, 0.6), (65539, 0.02), (300_000, CLUSTERED), (MANY, 0.1)]


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        pytest.importorskip("numba")
        torch.set_num_threads(3)
    monkeypatch.setenv("SUBNET_KERNELS_BACKEND", request.param)
    return str(request.param)


def test_compact_gives_the_values_of_its_example(backend: str) -> None:
    out = torch.ones(2)
    mask = bit_mask(torch.tensor([False, True, False, True]))
    total = compact(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask, out, accumulate=True, scale=2.0)
    assert out.tolist() == [5.0, 9.0]
    assert (total.dtype, float(total)) == (torch.float64, 106.0)


@pytest.mark.parametrize(("size", "density"), CASES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_compact_equals_dense_indexing(size: int, density: float | str, dtype: torch.dtype, backend: str) -> None:
    mask = chosen(size, density)
    bits, dense = bit_mask(mask), gradient(mask, dtype)
    out = torch.full((bits.count,), float("nan"))
    total = compact(dense, bits, out, accumulate=False, scale=0.37)
    expected = dense[mask].float() * 0.37
    assert same_bits(out, expected)
    torch.testing.assert_close(total, expected.double().square().sum(), rtol=1e-6, atol=0.0)
    total = compact(dense, bits, out, accumulate=True)
    expected = expected + dense[mask].float()
    assert same_bits(out, expected)
    torch.testing.assert_close(total, expected.double().square().sum(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("accumulate", [False, True])
def test_compact_gives_the_same_bits_for_every_number_of_threads(accumulate: bool) -> None:
    pytest.importorskip("numba")
    mask = chosen(MANY, 0.1)
    bits, dense = bit_mask(mask), gradient(mask, torch.bfloat16)
    start = values(bits.count, 3)
    expected, outs, totals = start.clone(), [], []
    reference.compact(dense, bits, expected, accumulate=accumulate, scale=0.37)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outs.append(start.clone())
        totals.append(compact(dense, bits, outs[-1], accumulate=accumulate, scale=0.37))
    assert all(same_bits(out, expected) for out in outs)
    # Sums of parts may be rounded otherwise; float64 leaves little of that.
    torch.testing.assert_close(totals, [totals[0]] * 3, rtol=1e-14, atol=0.0)


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
@pytest.mark.parametrize("dtype", FLOATS)
def test_compact_touches_nothing_behind_its_tensors(dtype: torch.dtype) -> None:
    pytest.importorskip("numba")
    for size, density in itertools.product((1, 31, 32, 33, 1000, 2080, 4099), (0.001, 0.3, 1.0)):
        mask = chosen(size, density)
        bits, dense = bit_mask(mask), gradient(mask, dtype)
        out = at_page_end(torch.zeros(bits.count))
        compact(at_page_end(dense), bits, out, accumulate=False)
        assert same_bits(out, dense[mask].float())


def test_compact_refuses_what_does_not_fit(backend: str) -> None:
    mask = bit_mask(torch.tensor([False, True, False, True]))
    dense, out = torch.zeros(4), torch.zeros(2)
    for bad_dense, bad_out, message in (
        (torch.zeros(5), out, "the mask has 4 elements, the tensor 5"),
        (dense.view(2, 2), out, "must be flat and contiguous"),
        (torch.zeros(8)[::2], out, "must be flat and contiguous"),
        (dense, torch.zeros(3), "`out` must be contiguous torch.float32 of shape"),
        (dense, out.bfloat16(), "`out` must be contiguous torch.float32 of shape"),
        (dense, torch.zeros(4)[::2], "`out` must be contiguous torch.float32 of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            compact(bad_dense, mask, bad_out, accumulate=False)
