"""Whether the ops that are about to be timed still give the right result: no speed is shown for one that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import subnet_kernels
from subnet_kernels import AdamWUpdate, BitMask, reference

_SIZES = (1, 63, 1000, 65539)
_DENSITIES = (0.0, 0.02, 0.3, 1.0)
_NUM_STEPS = 3


def failing_ops(device: torch.device) -> dict[str, str]:
    """Compare what runs on `device` with the plain-torch reference, bit by bit, on a few thousand random elements.

    Returns:
        Op to what is wrong with it; empty when all is well.
    """
    failing: dict[str, str] = {}
    for op, check in _CHECKS.items():
        for size in _SIZES:
            for density in _DENSITIES:
                if op in failing:
                    continue
                problem = _problem(check, size, density, device)
                if problem:
                    backend = subnet_kernels.choose(op, device).backend
                    failing[op] = (
                        f"`{op}` ({backend}) differs from its reference: {problem}, N = {size}, density {density}"
                    )
    return failing


def _problem(
    check: Callable[..., Iterator[tuple[str, Any, Any]]], size: int, density: float, device: torch.device
) -> str:
    generator = torch.Generator().manual_seed(size)
    bits = subnet_kernels.pack_bits(torch.rand(size, generator=generator) < density)
    masks = [BitMask.from_bits(bits, size, where) for where in (device, "cpu")]
    try:
        for name, ours, expected in check(generator, *masks):
            if not _same(ours, expected):
                return name
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _adamw(generator: torch.Generator, mask: BitMask, on_host: BitMask) -> Iterator[tuple[str, Any, Any]]:
    start = torch.randn(mask.num_elements, generator=generator).bfloat16()
    grads = [torch.randn(mask.num_elements, generator=generator).bfloat16() for _ in range(_NUM_STEPS)]
    results = []
    for where, run in ((mask, subnet_kernels.masked_adamw), (on_host, reference.masked_adamw)):
        param = start.to(where.device, copy=True)
        moments = [torch.zeros(where.count, device=where.device) for _ in range(2)]
        master = reference.gather(start, on_host, dtype=torch.float32).to(where.device, copy=True)
        scale = torch.tensor(0.7, device=where.device)
        for step, grad in enumerate(grads, start=1):
            update = AdamWUpdate(
                param, where, grad.to(where.device), moments[0], moments[1], master,
                lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=step, is_rounded=step > 1,
            )  # fmt: skip
            run([update], grad_scale=scale)
        results.append({"the weights": param, "exp_avg": moments[0], "exp_avg_sq": moments[1], "the masters": master})
    ours, expected = results
    for name, found in ours.items():
        yield name, found, expected[name]


def _compact(generator: torch.Generator, mask: BitMask, on_host: BitMask) -> Iterator[tuple[str, Any, Any]]:
    grad = torch.randn(mask.num_elements, generator=generator).bfloat16()
    buffers = [torch.ones(where.count, device=where.device) for where in (mask, on_host)]
    found = subnet_kernels.compact(grad.to(mask.device), mask, buffers[0], accumulate=True, scale=0.3)
    expected = reference.compact(grad, on_host, buffers[1], accumulate=True, scale=0.3)
    yield "the buffer", buffers[0], buffers[1]
    # Only the order of the sum may differ.
    yield "the sum of squares", bool(torch.isclose(found.cpu(), expected, rtol=1e-5)), True


def _changed(generator: torch.Generator, mask: BitMask, on_host: BitMask) -> Iterator[tuple[str, Any, Any]]:
    base = torch.randn(mask.num_elements, generator=generator).bfloat16()
    tuned = base.clone()
    chosen = reference.unpack_bits(on_host.bits, on_host.num_elements)
    tuned[chosen] += 0.5
    bits, count = subnet_kernels.changed_bits(base.to(mask.device), tuned.to(mask.device))
    expected, expected_count = reference.changed_bits(base, tuned, criterion="exact", tolerance=0.0)
    yield "the bits", bits, expected
    yield "the count", count, expected_count


def _compare(generator: torch.Generator, mask: BitMask, on_host: BitMask) -> Iterator[tuple[str, Any, Any]]:
    base = torch.randn(mask.num_elements, generator=generator).bfloat16()
    tuned = torch.where(reference.unpack_bits(on_host.bits, on_host.num_elements), base * 1.5, base)
    tolerances = (1e-3, 1e-1)
    found = subnet_kernels.compare(base.to(mask.device), tuned.to(mask.device), offset=5, tolerances=tolerances)
    expected = reference.compare(base, tuned, offset=5, tolerances=tolerances)
    yield "the bits", found.bits, expected.bits
    for name in ("count", "beyond", "base_fingerprint", "tuned_fingerprint"):
        yield f"`{name}`", getattr(found, name), getattr(expected, name)


def _fingerprint(generator: torch.Generator, mask: BitMask, on_host: BitMask) -> Iterator[tuple[str, Any, Any]]:
    values = torch.randn(mask.num_elements, generator=generator).bfloat16()
    for outside, theirs in ((None, None), (mask, on_host)):
        found = subnet_kernels.fingerprint(values.to(mask.device), outside=outside)
        yield "the sums", found, reference.fingerprint(values, offset=0, outside=theirs)


def _same(ours: Any, expected: Any) -> bool:
    if not isinstance(ours, torch.Tensor):
        return bool(ours == expected)
    return torch.equal(subnet_kernels.bits_view(ours.cpu()), subnet_kernels.bits_view(expected))


_CHECKS: dict[str, Callable[..., Iterator[tuple[str, Any, Any]]]] = {
    "changed_bits": _changed,
    "compact": _compact,
    "compare": _compare,
    "fingerprint": _fingerprint,
    "masked_adamw": _adamw,
}
