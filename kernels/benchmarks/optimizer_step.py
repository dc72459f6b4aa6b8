"""Time one optimizer step on SmolLM2-135M's shapes: the masked step beside torch's own, in one run on one machine.

Weights and gradients are bfloat16. The masked step keeps float32 masters and moments; `torch.optim.AdamW` keeps its
moments in bfloat16 and has no masters, so it moves fewer bytes and loses small updates. Each row is the median of
several steps after one warm-up step.

Usage: python kernels/benchmarks/optimizer_step.py [--layers 30] [--repeats 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

import subnet_kernels

HIDDEN, MLP, KEY_VALUE, VOCABULARY = 576, 1536, 192, 49152
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 1.0)
OPTIONS = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def shapes(num_layers: int) -> list[tuple[int, ...]]:
    """Return the shapes of the model's tensors."""
    layer: list[tuple[int, ...]] = [
        (HIDDEN, HIDDEN), (KEY_VALUE, HIDDEN), (KEY_VALUE, HIDDEN), (HIDDEN, HIDDEN),
        (MLP, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP), (HIDDEN,), (HIDDEN,),
    ]  # fmt: skip
    return [(VOCABULARY, HIDDEN), *(layer * num_layers), (HIDDEN,)]


def median_ms(step: Callable[[], None], repeats: int) -> float:
    """Return the median time of `step` in milliseconds, after one warm-up."""
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def torch_step(params: list[torch.Tensor], *, masks: list[torch.Tensor] | None) -> Callable[[], None]:
    """Return a step of `torch.optim.AdamW(fused=True)`; with masks, the gradient is multiplied by them first."""
    optimizer = torch.optim.AdamW(params, fused=True, **OPTIONS)  # type: ignore[arg-type]
    grads = [param.grad.clone() for param in params]

    def step() -> None:
        for index, param in enumerate(params):
            param.grad = grads[index] if masks is None else grads[index] * masks[index]
        optimizer.step()

    return step


def masked_step(params: list[torch.Tensor], masks: list[torch.Tensor]) -> Callable[[], None]:
    """Return our step straight from dense gradients: gather, AdamW on the compact state, scatter."""
    bits = [subnet_kernels.pack_bits(mask.view(-1)) for mask in masks]
    counts = [int(mask.sum()) for mask in masks]
    flat = [param.detach().view(-1) for param in params]
    grads = [param.grad.view(-1) for param in params]
    masters = [subnet_kernels.gather(*each) for each in zip(flat, bits, counts, strict=True)]
    moments = [(torch.zeros(count), torch.zeros(count)) for count in counts]
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        for index, param in enumerate(flat):
            grad = subnet_kernels.gather(grads[index], bits[index], counts[index])
            subnet_kernels.masked_adamw(
                param, bits[index], grad, *moments[index], masters[index], step=steps, **OPTIONS
            )  # type: ignore[arg-type]

    return step


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, help="decoder layers (30 is the whole model)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    params = [torch.randn(shape).mul_(0.02).bfloat16().requires_grad_() for shape in shapes(options.layers)]
    for param in params:
        param.grad = torch.randn_like(param)
    num_weights = sum(param.numel() for param in params)
    rows = [{"method": "torch AdamW fused, bf16 state", "density": 1.0}]
    rows[0]["median_ms"] = median_ms(torch_step(params, masks=None), options.repeats)
    for density in DENSITIES:
        masks = [torch.rand(param.shape) < density for param in params]
        multiplied = median_ms(torch_step(params, masks=masks), options.repeats)
        ours = median_ms(masked_step(params, masks), options.repeats)
        rows.append({"method": "gradient times mask, then torch", "density": density, "median_ms": multiplied})
        rows.append({"method": "subnet_kernels, fp32 masters", "density": density, "median_ms": ours})
    conditions = {
        "weights": num_weights,
        "dtype": "bfloat16",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "backend": subnet_kernels.choose("masked_adamw", torch.device("cpu")).backend,
    }
    if options.json:
        print(json.dumps({"conditions": conditions, "rows": rows}))
        return
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    for row in rows:
        print(f"{row['method']:<34} density {row['density']:<5} {row['median_ms']:9.1f} ms")


if __name__ == "__main__":
    main()
