"""Check the Triton kernels on the GPU of this machine: their numbers against the reference on the CPU, then times.

Every op must give the reference's bits; sums of squares may differ in the order of their additions. Times are medians
of CUDA events over bfloat16 weights, far more than the GPU caches, and are only taken if every number is right.

Usage: python kernels/benchmarks/gpu_check.py [--weights 400] [--repeats 20] [--json]
Exit codes: 0 all right, 1 a number is wrong, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import subnet_kernels
from subnet_kernels import AdamWUpdate, BitMask, choose, pack_bits, reference, rounding_key, split_master
from subnet_kernels.traffic import GPU_SECTOR_BYTES, step_traffic

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_TENSORS = 16
_SIZE = 70_001
# At most eight squares are added in float32, where each addition errs by at most 2**-24 of the sum.
_SUM_RTOL = 8 * 2.0**-24


def main() -> int:
    """Check, then time; print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=400, help="millions of weights in the timed step")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs per row")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is False): nothing was checked.", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    failures = [name for name, is_right in checks(device) if not is_right]
    if failures:
        print("These differ from the reference, so nothing was timed:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    report = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "backend": choose("masked_adamw", device).backend,
        "weights": options.weights * 1_000_000,
        "repeats": options.repeats,
        "copy_gb_per_s": _copy_bandwidth(device, options.repeats) / 1e9,
    }
    rows = list(_times(device, options.weights * 1_000_000, options.repeats))
    if options.json:
        print(json.dumps({"conditions": report, "rows": rows}))
        return 0
    print("Numbers agree with the reference. " + ", ".join(f"{name} {value}" for name, value in report.items()))
    print("| method | density | ms | GB/s by counted bytes |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['method']} | {row['density']} | {row['median_ms']:.3f} | {row['gb_per_s']:.0f} |")
    return 0


def checks(device: torch.device, size: int = _SIZE) -> Iterator[tuple[str, bool]]:
    """Run every op on `device` and yield its name with whether it gave what the reference gives on the CPU."""
    for density in (1 / size, 0.2, 0.6, 1.0):
        chosen = torch.rand(size, generator=_seeded(0)) < density
        here = BitMask.from_bits(pack_bits(chosen), size)
        there = BitMask.from_bits(pack_bits(chosen), size, device)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            dense = _normal(size, 1).to(dtype).masked_fill(~chosen, float("nan"))
            compact = _normal(here.count, 2).to(dtype)
            yield from (
                (f"{op}, {dtype}, density {density:.2g}", is_right)
                for op, is_right in _check_copies(dense, compact, here, there)
            )
        for master in ("float32", "remainder", "none"):
            for compact_grad in (True, False):
                name = f"masked_adamw, {master}, {'compact' if compact_grad else 'dense'} gradient, {density:.2g}"
                yield name, _check_step(here, there, chosen, master, compact_grad)


def _check_copies(
    dense: torch.Tensor, compact: torch.Tensor, here: BitMask, there: BitMask
) -> Iterator[tuple[str, bool]]:
    moved, device = dense.to(there.device), there.device
    gathered = _run("gather", moved, there, dtype=torch.float32)
    yield "gather", _same(gathered, reference.gather(dense, here, dtype=torch.float32))
    expected, values, theirs = dense.clone(), compact.clone(), compact.to(device, copy=True)
    reference.swap(expected, here, values)
    swapped = moved.clone()
    _run("swap", swapped, there, theirs)
    yield "swap", _same(swapped, expected) and _same(theirs, values)
    scattered = moved.clone()
    _run("scatter", scattered, there, compact.to(device))
    yield "scatter", _same(scattered, expected)
    buffer, out = _normal(here.count, 3), _normal(here.count, 3).to(device)
    total = reference.compact(dense, here, buffer, accumulate=True, scale=0.3)
    found = _run("compact", moved, there, out, accumulate=True, scale=0.3)
    yield "compact", _same(out, buffer) and torch.allclose(found.cpu(), total, rtol=_SUM_RTOL, atol=0.0)
    kept = reference.fingerprint(dense, offset=5, outside=here)
    yield "fingerprint", _run("fingerprint", moved, offset=5, outside=there) == kept
    for criterion in subnet_kernels.CRITERIA:
        bits, count = reference.changed_bits(dense, dense.flip(0), criterion=criterion, tolerance=0.5)
        theirs_bits, theirs_count = _run(
            "changed_bits", moved, moved.flip(0), criterion=criterion, tolerance=0.5
        )  # fmt: skip
        yield f"changed_bits, {criterion}", _same(theirs_bits, bits) and theirs_count == count


def _check_step(here: BitMask, there: BitMask, chosen: torch.Tensor, master: str, compact_grad: bool) -> bool:
    param = _normal(here.num_elements, 4).bfloat16()
    masters = _normal(here.count, 5)
    param[chosen], remainders = split_master(masters)
    update = AdamWUpdate(
        param, here, _normal(here.count, 6) if compact_grad else _normal(here.num_elements, 6).bfloat16(),
        _normal(here.count, 7), _normal(here.count, 8).square(),
        {"float32": masters, "remainder": remainders, "none": None}[master],
        lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=3,
        is_rounded=master == "float32", rounding_key=rounding_key(1, 2, 3),
    )  # fmt: skip
    fields = {field.name: getattr(update, field.name) for field in dataclasses.fields(update)}
    tensors = {name: field for name, field in fields.items() if isinstance(field, torch.Tensor)}
    moved = {name: tensor.to(there.device, copy=True) for name, tensor in tensors.items()}
    scale = torch.tensor(0.7)
    _run(
        "masked_adamw", [dataclasses.replace(update, mask=there, **moved)], grad_scale=scale.to(there.device), cache={}
    )
    reference.masked_adamw([update], grad_scale=scale)
    return all(_same(moved[name], tensor) for name, tensor in tensors.items())


def _times(device: torch.device, num_weights: int, repeats: int) -> Iterator[dict[str, Any]]:
    size = num_weights // _TENSORS
    params = [torch.randn(size, device=device).mul_(0.02).bfloat16() for _ in range(_TENSORS)]
    grads = [torch.randn(size, device=device).bfloat16() for _ in range(_TENSORS)]
    for param, grad in zip(params, grads, strict=True):
        param.requires_grad_().grad = grad
    fused = torch.optim.AdamW(params, lr=1e-6, fused=True)
    median = _median_ms(fused.step, device, repeats)
    # Weights, both moments and the gradient, all bfloat16: 7 values read or written.
    yield {"method": "torch AdamW fused, bf16 state", "density": 1.0, **_speed(median, 14.0 * num_weights)}
    del fused
    for density in DENSITIES:
        packed = [pack_bits(torch.rand(size, generator=_seeded(i)) < density) for i in range(_TENSORS)]
        masks = [BitMask.from_bits(bits, size, device) for bits in packed]
        for master in ("float32", "remainder"):
            for compact_grad in (True, False):
                step = _step(params, grads, masks, master, compact_grad)
                counted = step_traffic(
                    density,
                    master=master,
                    grad_bytes=None if compact_grad else 2,
                    changed=None if density == 1.0 else 0.01,  # under a full mask all weights are written
                    sector_bytes=GPU_SECTOR_BYTES,
                )
                name = f"masked_adamw, {master} masters, {'compact' if compact_grad else 'dense'} gradient"
                median = _median_ms(step, device, repeats)
                yield {"method": name, "density": density, **_speed(median, counted * num_weights)}
        buffers = [torch.zeros(mask.count, device=device) for mask in masks]
        median = _median_ms(_compaction(grads, masks, buffers), device, repeats)
        dense_bytes = step_traffic(density, compaction=True, sector_bytes=GPU_SECTOR_BYTES)
        counted = dense_bytes - step_traffic(density, grad_bytes=None, sector_bytes=GPU_SECTOR_BYTES)
        yield {"method": "compact", "density": density, **_speed(median, counted * num_weights)}


def _step(
    params: list[torch.Tensor], grads: list[torch.Tensor], masks: list[BitMask], master: str, compact_grad: bool
) -> Callable[[], None]:
    updates = []
    for param, grad, mask in zip(params, grads, masks, strict=True):
        weights = _run("gather", param.detach(), mask, dtype=torch.float32)
        kept = weights if master == "float32" else torch.zeros(mask.count, dtype=torch.int16, device=mask.device)
        given = _run("gather", grad, mask, dtype=torch.float32) if compact_grad else grad
        update = AdamWUpdate(
            param.detach(), mask, given, torch.zeros_like(weights), torch.zeros_like(weights), kept,
            lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, step=1, is_rounded=master == "float32",
        )  # fmt: skip
        updates.append(update)
    cache: dict[Any, Any] = {}
    return lambda: _run("masked_adamw", updates, grad_scale=None, cache=cache)


def _compaction(grads: list[torch.Tensor], masks: list[BitMask], buffers: list[torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        for grad, mask, buffer in zip(grads, masks, buffers, strict=True):
            _run("compact", grad, mask, buffer, accumulate=False, scale=1.0)

    return run


def _run(op: str, *arguments: Any, **options: Any) -> Any:
    first = arguments[0][0].param if isinstance(arguments[0], list) else arguments[0]
    return choose(op, first.device, backend="triton").function(*arguments, **options)


def _median_ms(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _copy_bandwidth(device: torch.device, repeats: int) -> float:
    source = torch.ones(1 << 29, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (_median_ms(lambda: target.copy_(source), device, repeats) / 1000)


def _speed(median_ms: float, num_bytes: float) -> dict[str, float]:
    return {"median_ms": median_ms, "gb_per_s": num_bytes / median_ms / 1e6}


def _normal(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=_seeded(seed))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    found = found.cpu()
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


if __name__ == "__main__":
    sys.exit(main())
