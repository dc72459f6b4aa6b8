"""Changed bits by each criterion, against one line of torch."""

from __future__ import annotations

import pytest
import torch
from helpers import SIZES

from subnet_kernels import changed_bits, unpack_bits


def pair(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    base = torch.randn(size, generator=generator)
    noise = torch.randn(size, generator=generator) * 10.0 ** -torch.randint(1, 8, (size,), generator=generator)
    keep = torch.rand(size, generator=generator) < 0.5
    return base.to(dtype), torch.where(keep, base, base + noise).to(dtype)


def test_changed_bits_gives_the_bits_of_its_example() -> None:
    bits, count = changed_bits(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.5, 3.0]))
    assert (bits.tolist(), count) == ([0b010], 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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
    nan, inf = float("nan"), float("inf")
    base = torch.tensor([0.0, nan, nan, 1.0, inf, inf])
    tuned = torch.tensor([-0.0, nan, 1.0, nan, inf, -inf])
    assert unpack_bits(changed_bits(base, tuned)[0], 6).tolist() == [True, False, True, True, False, True]
    absolute, _ = changed_bits(base, tuned, criterion="absolute", tolerance=1e-5)
    assert unpack_bits(absolute, 6).tolist() == [False, False, True, True, False, True]


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
