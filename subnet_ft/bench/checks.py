"""Whether the ops that are about to be timed still give the right result: no speed is shown for one that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import subnet_kernels
from subnet_ft.bench.step import LEARNING_RATE
from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW
from subnet_kernels import AdamWUpdate, BitMask, reference

_SIZES = (1, 63, 1000, 65539)
_DENSITIES = (0.0, 0.02, 0.3, 1.0)
_NUM_STEPS = 3

# Shape and density of the tensors of one optimizer: one element, whole and partial tiles, trained whole, in part, not.
_TENSORS: dict[str, tuple[tuple[int, ...], float]] = {
    "one": ((1,), 1.0),
    "tail": ((1000,), 0.3),
    "tile": ((64, 16), 0.1),
    "whole": ((129, 65), 1.0),
    "untrained": ((63,), 0.0),
    "large": ((65539,), 0.2),
    "sparse": ((257, 129), 0.02),
}


def failing_ops(device: torch.device) -> dict[str, str]:
    """Compare what runs on `device` with the plain-torch reference, bit by bit, on a few thousand random elements.

    Every op is checked by itself; then `MaskedAdamW`, which is what is timed, over many tensors and several steps.

    Returns:
        Op to what is wrong with it; empty when all is well.
    """
    failing: dict[str, str] = {}
    for op, check in _CHECKS.items():
        for size in _SIZES:
            for density in _DENSITIES:
                if op in failing:
                    continue
                problem = _problem(_op(check, size, density, device))
                if problem:
                    backend = subnet_kernels.choose(op, device).backend
                    failing[op] = (
                        f"`{op}` ({backend}) differs from its reference: {problem}, N = {size}, density {density}"
                    )
    for compact_grads in (False, True):
        # Where an op is wrong by itself, the optimizer is wrong for that reason.
        if failing.keys().isdisjoint(("compact", "masked_adamw")):
            problem = _problem(_optimizer(device, compact_grads))
            if problem:
                backend = subnet_kernels.choose("masked_adamw", device).backend
                failing["masked_adamw"] = (
                    f"`masked_adamw` ({backend}) differs from its reference: {problem}, "
                    f"MaskedAdamW(compact_grads={compact_grads})"
                )
    return failing


def _problem(comparisons: Iterator[tuple[str, Any, Any]]) -> str:
    """Return what differs first, or the error that came instead; empty when all is the same."""
    try:
        for name, ours, expected in comparisons:
            if not _same(ours, expected):
                return name
    except Exception as error:  # whatever a kernel raises, no speed is shown for it, and this is why
        return f"{type(error).__name__}: {error}"
    return ""


def _op(
    check: Callable[..., Iterator[tuple[str, Any, Any]]], size: int, density: float, device: torch.device
) -> Iterator[tuple[str, Any, Any]]:
    """Yield what one op and its reference give on random elements."""
    generator = torch.Generator().manual_seed(size)
    bits = subnet_kernels.pack_bits(torch.rand(size, generator=generator) < density)
    yield from check(generator, *(BitMask.from_bits(bits, size, where) for where in (device, "cpu")))


def _optimizer(device: torch.device, compact_grads: bool) -> Iterator[tuple[str, Any, Any]]:
    """Yield what `MaskedAdamW` and the reference on copies of its own give after every step, tensor by tensor."""
    generator = torch.Generator().manual_seed(0)
    start = {
        name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for name, (shape, _) in _TENSORS.items()
    }
    mask = SubnetMask.from_dense(
        {name: torch.rand(shape, generator=generator) < density for name, (shape, density) in _TENSORS.items()}
    )
    parameters = {name: torch.nn.Parameter(weight.to(device, copy=True)) for name, weight in start.items()}
    optimizer = MaskedAdamW(
        parameters.items(), mask, lr=LEARNING_RATE, max_grad_norm=None, compact_grads=compact_grads, check_base=False
    )
    twins = {name: _twin(start[name], tensor.bits) for name, tensor in mask.tensors.items() if tensor.count}
    for step in range(1, _NUM_STEPS + 1):
        for name, twin in twins.items():
            grad = torch.randn(start[name].shape, generator=generator).bfloat16()
            parameters[name].grad = grad.to(device, copy=True)
            twin.grad, twin.step, twin.is_rounded = grad.view(-1), step, step > 1
            if compact_grads:
                twin.grad = torch.empty(twin.mask.count)
                reference.compact(grad.view(-1), twin.mask, twin.grad, accumulate=False, scale=1.0)
        optimizer.step()
        reference.masked_adamw(list(twins.values()), grad_scale=None)
        for name, twin in twins.items():
            state = optimizer.state[parameters[name]]
            where = f"of `{name}` after step {step}"
            yield f"the weights {where}", parameters[name].detach().view(-1), twin.param
            for key in ("exp_avg", "exp_avg_sq", "master"):
                yield f"`{key}` {where}", state[key], getattr(twin, key)
    yield "the untrained weights", parameters["untrained"].detach(), start["untrained"]


def _twin(start: torch.Tensor, bits: torch.Tensor) -> AdamWUpdate:
    """Return the reference's description of one tensor, with weights and state of its own; the gradient is to come."""
    mask = BitMask.from_bits(bits, start.numel(), "cpu")
    param = start.flatten().clone()
    return AdamWUpdate(
        param, mask, torch.empty(0), torch.zeros(mask.count), torch.zeros(mask.count),
        reference.gather(param, mask, dtype=torch.float32),
        lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, step=0,
    )  # fmt: skip


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
