"""Changed bits by each criterion against one line of torch, and all of a comparison, for every backend."""

from __future__ import annotations

import pytest
import torch
from helpers import SIZES

from subnet_kernels import changed_bits, choose, compare, fingerprint, unpack_bits

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        pytest.importorskip("numba")
        torch.set_num_threads(3)  # large tensors are cut into runs of blocks
    monkeypatch.setenv("SUBNET_KERNELS_BACKEND", request.param)
    return str(request.param)


def pair(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=generator)
    noise = torch.randn(size, generator=generator) * 10.0 ** -torch.randint(1, 8, (size,), generator=generator)
    keep = torch.rand(size, generator=generator) < 0.5
    return base.to(dtype), torch.where(keep, base, base + noise).to(dtype)


def any_bits(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Draw 65,539 weights of which every pattern of bits is possible: NaN, infinities, subnormals."""
    patterns = torch.randint(-(2**31), 2**31, (65539,), generator=torch.Generator().manual_seed(seed))
    return patterns.to(torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)


def test_changed_bits_gives_the_bits_of_its_example() -> None:
    bits, count = changed_bits(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.5, 3.0]))
    assert (bits.tolist(), count) == ([0b010], 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_changed_bits_agrees_with_one_line_of_torch(size: int, dtype: torch.dtype) -> None:
    base, tuned = pair(size, dtype)
    delta = (tuned.float() - base.float()).abs()
    expected = {
        ("exact", 0.0): base != tuned,
        ("absolute", 1e-3): delta > 1e-3,
        ("relative", 1e-2): delta > 1e-2 * base.float().abs(),
    }
    for (criterion, tolerance), changed in expected.items():
        bits, count = changed_bits(base, tuned, criterion=criterion, tolerance=tolerance)
        assert torch.equal(unpack_bits(bits, size), changed)
        assert count == int(changed.sum())


def test_changed_bits_subtracts_in_float32() -> None:
    base, tuned = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)
    assert changed_bits(base, tuned, criterion="absolute", tolerance=0.0078124)[1] == 1
    assert changed_bits(base, tuned, criterion="absolute", tolerance=0.0078126)[1] == 0


def test_changed_bits_sees_signed_zeros_and_nan() -> None:
    base = torch.tensor([0.0, NAN, NAN, 1.0, INF, INF])
    tuned = torch.tensor([-0.0, NAN, 1.0, NAN, INF, -INF])
    assert unpack_bits(changed_bits(base, tuned)[0], 6).tolist() == [True, False, True, True, False, True]
    absolute, _ = changed_bits(base, tuned, criterion="absolute", tolerance=1e-5)
    assert unpack_bits(absolute, 6).tolist() == [False, False, True, True, False, True]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("criterion", "tolerance"),
    [("exact", 0.0), ("absolute", 0.0), ("absolute", 1e-3), ("relative", 0.1), ("relative", 1e300), ("absolute", INF)],
)
def test_changed_bits_equals_the_reference_on_any_bits(criterion: str, tolerance: float, dtype: torch.dtype) -> None:
    base, tuned = any_bits(dtype, seed=1), any_bits(dtype, seed=2)
    tuned[::3] = base[::3]
    definition = choose("changed_bits", base.device, "reference").function
    expected_bits, expected_count = definition(base, tuned, criterion=criterion, tolerance=tolerance)
    bits, count = changed_bits(base, tuned, criterion=criterion, tolerance=tolerance)
    assert torch.equal(bits, expected_bits)
    assert count == expected_count


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8])
def test_changed_bits_takes_other_dtypes(dtype: torch.dtype) -> None:
    base = torch.arange(100).to(dtype)
    tuned = base.clone()
    tuned[[3, 70]] += 2
    for criterion in ("exact", "absolute", "relative"):
        bits, count = changed_bits(base, tuned, criterion=criterion)
        assert (unpack_bits(bits, 100).nonzero().view(-1).tolist(), count) == ([3, 70], 2)


def test_changed_bits_reads_a_strided_tensor() -> None:
    assert changed_bits(torch.arange(8.0)[::2], torch.tensor([0.0, 2.0, 4.5, 6.0]))[0].tolist() == [0b0100]


def test_compare_gives_the_numbers_of_its_example() -> None:
    found = compare(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.5, 2.0]), tolerances=[0.1, 0.75])
    assert (found.bits.tolist(), found.count, found.beyond) == ([0b110], 2, (2, 1))


@pytest.mark.parametrize("size", [0, *SIZES])
@pytest.mark.parametrize("dtype", FLOATS)
def test_compare_is_changed_bits_and_fingerprints_in_one(size: int, dtype: torch.dtype) -> None:
    base, tuned = pair(size, dtype)
    found = compare(base, tuned, offset=2**31 + 8, tolerances=[0.0, 1e-3])
    bits, count = changed_bits(base, tuned)
    assert torch.equal(found.bits, bits)
    assert found.count == count
    delta = (tuned.float() - base.float()).abs()
    assert found.beyond == (int((delta > 0).sum()), int((delta > 1e-3).sum()))
    assert found.base_fingerprint == fingerprint(base, offset=2**31 + 8)
    assert found.tuned_fingerprint == fingerprint(tuned, offset=2**31 + 8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_compare_equals_the_reference_on_any_bits(dtype: torch.dtype) -> None:
    base, tuned = any_bits(dtype, seed=1), any_bits(dtype, seed=2)
    tuned[::3] = base[::3]
    tolerances = (0.0, 1e-8, 1.0, 1e300)
    expected = choose("compare", base.device, "reference").function(base, tuned, offset=0, tolerances=tolerances)
    found = compare(base, tuned, tolerances=tolerances)
    assert torch.equal(found.bits, expected.bits)
    assert vars(found) | {"bits": None} == vars(expected) | {"bits": None}


def test_compare_puts_a_nan_on_one_side_beyond_every_tolerance() -> None:
    base = torch.tensor([0.0, NAN, NAN, 1.0, INF, INF])
    tuned = torch.tensor([-0.0, -NAN, 1.0, NAN, INF, -INF])
    found = compare(base, tuned, tolerances=[0.0, 1e30])
    assert (found.bits.tolist(), found.count, found.beyond) == ([0b101111], 5, (3, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "bitwise"}, "`criterion` must be one of exact"),
        ({"criterion": "absolute", "tolerance": -1.0}, "`tolerance` must be >= 0"),
        ({"criterion": "absolute", "tolerance": float("nan")}, "`tolerance` must be >= 0"),
    ],
)
def test_changed_bits_names_a_bad_option(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed_bits(torch.zeros(2), torch.zeros(2), **options)  # type: ignore[arg-type]


def test_changed_bits_refuses_two_dtypes() -> None:
    with pytest.raises(ValueError, match="one dtype and length"):
        changed_bits(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offset": -1}, "`offset` must be >= 0, got -1"),
        ({"tolerances": [1e-5, -1.0]}, r"`tolerances` must be >= 0, got \[1e-05, -1.0\]"),
        ({"tolerances": [NAN]}, "`tolerances` must be >= 0"),
    ],
)
def test_compare_names_a_bad_option(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(torch.zeros(2), torch.zeros(2), **options)  # type: ignore[arg-type]


def test_compare_refuses_what_is_no_weight() -> None:
    with pytest.raises(ValueError, match=r"must be bfloat16, float16 or float32, got torch\.float64"):
        compare(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="one dtype and length"):
        compare(torch.zeros(2), torch.zeros(3))
