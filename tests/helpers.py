"""What several test files share: tolerances with their reasons, and small builders."""

from __future__ import annotations

import torch

from subnet_ft.masks import SubnetMask

QUIET = {
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}
"""Fields of a trainer's config in every short run: log each step, save and report nothing, stay on the CPU."""


def ulp_distance(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """Return the largest distance in units in the last place between two float32 tensors (no NaN)."""

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.contiguous().view(torch.int32).to(torch.int64)
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    if actual.numel() == 0:
        return 0
    return int((ordered(actual) - ordered(expected)).abs().max())


def ulps_at_scale(actual: torch.Tensor, expected: torch.Tensor, scale: float) -> float:
    """Return the largest difference of two float32 tensors in units in the last place of the operands it comes from.

    A sum that cancels keeps the absolute error of its terms, so a unit there is that of the largest term.

    Args:
        scale: Magnitude of the largest term, such as a step size; larger values count with their own unit.
    """
    magnitude = expected.double().abs().clamp(min=scale)
    unit = torch.exp2(torch.floor(torch.log2(magnitude)) - 23)
    return float(((actual.double() - expected.double()).abs() / unit).max()) if actual.numel() else 0.0


RELATIVE = 1e-5
"""`relative` of two float32 gradients of one loss that were summed in another order: such sums differ by 7e-7 here, a
micro-batch that is lost or counted twice by 1e-1, a buffer of fewer digits by 5e-4 (float16) or 4e-3 (bfloat16)."""


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the distance of `a` from `b` as a part of the length of `b`, both 2-norms in float64."""
    distance, length = (a.double() - b.double()).norm(), b.double().norm()
    return float(distance / length) if length else float(distance)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare two tensors bit by bit, so that NaN equals itself and -0.0 differs from 0.0."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


SIZES = (1, 63, 1000, 65539)
"""Element counts: one element, a partial byte, a partial tile, and past one chunk of every op."""

DENSITIES = (0.0, 1 / 1000, 0.2, 1.0)
"""Empty, next to empty, typical and full."""


def random_bits(size: int, density: float, seed: int = 0) -> torch.Tensor:
    """Draw (size,) bool with about `density` of it true."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density


def small_model(dtype: torch.dtype) -> torch.nn.Module:
    """Build a model of a few hundred weights, the same every time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(13, 17), torch.nn.LayerNorm(17), torch.nn.Linear(17, 5)).to(dtype)


def random_mask(model: torch.nn.Module, density: float, seed: int = 1) -> SubnetMask:
    """Mask about `density` of every tensor of `model`."""
    generator = torch.Generator().manual_seed(seed)
    return SubnetMask.from_dense(
        {name: torch.rand(p.shape, generator=generator) < density for name, p in model.named_parameters()}
    )


def set_gradients(model: torch.nn.Module, step: int) -> None:
    """Give every trainable parameter the random gradient of that step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
