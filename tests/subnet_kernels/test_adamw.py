"""The masked AdamW op: its example, and a plain dense update over sizes and densities."""

from __future__ import annotations

import pytest
import torch
from helpers import DENSITIES, SIZES, random_bits, same_bits

from subnet_kernels import masked_adamw, pack_bits, round_to_bfloat16

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def test_masked_adamw_gives_the_values_of_its_example() -> None:
    param = torch.tensor([1.0, 1.0, 1.0, 1.0])
    moments = [torch.zeros(2), torch.zeros(2)]
    bits = torch.tensor([0b1010], dtype=torch.uint8)
    masked_adamw(param, bits, torch.full((2,), 0.5), *moments, None, step=1, **OPTIONS)  # type: ignore[arg-type]
    assert same_bits(param[[0, 2]], torch.ones(2))
    torch.testing.assert_close(param[[1, 3]], torch.tensor([0.9, 0.9]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_adamw_equals_a_dense_update(size: int, density: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    mask = random_bits(size, density)
    start = torch.randn(size, generator=generator).to(dtype)
    grad, exp_avg = (torch.randn(size, generator=generator) for _ in range(2))
    exp_avg_sq = torch.rand(size, generator=generator)
    scale = torch.tensor(0.25)

    param, moments = start.clone(), [exp_avg[mask].clone(), exp_avg_sq[mask].clone()]
    master = None if dtype == torch.float32 else start[mask].float()
    masked_adamw(
        param, pack_bits(mask), grad[mask], *moments, master,
        lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3, step=7, grad_scale=scale,
    )  # fmt: skip

    first = 0.8 * exp_avg + 0.2 * grad * scale
    second = 0.95 * exp_avg_sq + 0.05 * (grad * scale) ** 2
    denominator = (second / (1 - 0.95**7)).sqrt() + 1e-6
    expected = start.float() * (1 - 1e-2 * 0.3) - 1e-2 * (first / (1 - 0.8**7)) / denominator
    torch.testing.assert_close(param[mask] if master is None else master, expected[mask], rtol=1e-6, atol=1e-7)
    assert same_bits(param[~mask], start[~mask])
    torch.testing.assert_close(moments[0], first[mask], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments[1], second[mask], rtol=1e-6, atol=1e-7)
    if master is not None:
        assert same_bits(param[mask], round_to_bfloat16(master))


def test_masked_adamw_refuses_a_strided_parameter() -> None:
    with pytest.raises(ValueError, match="must be contiguous"):
        masked_adamw(
            torch.zeros(8)[::2], torch.tensor([1], dtype=torch.uint8), torch.ones(1), torch.zeros(1), torch.zeros(1),
            None, step=1, **OPTIONS,  # type: ignore[arg-type]
        )  # fmt: skip
