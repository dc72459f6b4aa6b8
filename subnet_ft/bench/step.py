"""The time of one optimizer step on the shapes of a real model: ours beside torch's own, in one run on one machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from subnet_ft.masks import SubnetMask
from subnet_ft.optim import MaskedAdamW

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 1.0)
LEARNING_RATE = 1e-6
"""What RL uses, and the default of `MaskedAdamW`. It decides how many weights change in a step, and so are written."""
_OPTIONS: dict[str, Any] = {"lr": LEARNING_RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

FUSED = "torch AdamW fused, bf16 state"
TIMES_MASK = "gradient times mask, then torch AdamW fused"
GATHERED = "gather by indices, torch AdamW fused on fp32, scatter"
OURS_DENSE = "subnet-ft, from dense gradients"
OURS_COMPACT = "subnet-ft, compaction and step"
FUSED_MASTERS = "torch AdamW fused, fp32 masters"


def smollm2_shapes(num_layers: int = 30) -> dict[str, tuple[int, ...]]:
    """Return name to shape of SmolLM2-135M's tensors, with as many decoder layers as asked for."""
    hidden, mlp, key_value, vocabulary = 576, 1536, 192, 49152
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(num_layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return {**shapes, "model.norm.weight": (hidden,)}


@dataclass(frozen=True)
class Method:
    """One way to take a step: `before` is not timed, `step` is; `memory` gives bytes by component after a step.

    Where only changed weights are written, `changed` takes one more step and returns their share of the trainable ones.
    """

    name: str
    step: Callable[[], object]
    memory: Callable[[], Mapping[str, int]]
    before: Callable[[], object] = field(default=lambda: None)
    changed: Callable[[], float] | None = None


def measure_steps(
    *,
    densities: Sequence[float] = DENSITIES,
    num_layers: int = 30,
    repeats: int = 7,
    refused: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a row per density and method, each density's methods timed in turns.

    Weights and dense gradients are bfloat16. Medians of `repeats` steps after one that is not counted, so compilation
    is not.

    Args:
        densities: Of uniform random masks.
        num_layers: Decoder layers; 30 is the whole model.
        repeats: Timed steps per method.
        refused: Op to the reason why no speed may be shown for it; our rows then have none.
    """
    shapes = smollm2_shapes(num_layers)
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for name, shape in shapes.items()}
    grads = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    num_parameters = sum(weight.numel() for weight in start.values())
    reasons = [reason for op, reason in (refused or {}).items() if op in ("masked_adamw", "compact")]
    for density in densities:
        dense = {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}
        methods = _methods(density, start, grads, dense)
        times: dict[str, list[float]] = {method.name: [] for method in methods}
        for turn in range(repeats + 1):
            for method in methods:
                method.before()
                began = time.perf_counter()
                method.step()
                if turn:
                    times[method.name].append(1000 * (time.perf_counter() - began))
        for method in methods:
            is_refused = bool(reasons) and method.name in (OURS_DENSE, OURS_COMPACT)
            memory = dict(method.memory())
            yield {
                "op": "optimizer_step",
                "method": method.name,
                "density": density,
                "median_ms": None if is_refused else statistics.median(times[method.name]),
                "fastest_ms": None if is_refused else min(times[method.name]),
                "bytes_per_parameter": sum(memory.values()) / num_parameters,
                "memory": memory,
                **({} if method.changed is None else {"changed_share": method.changed()}),
                **({"refused": reasons[0]} if is_refused else {}),
            }


def _methods(
    density: float,
    start: Mapping[str, torch.Tensor],
    grads: Mapping[str, torch.Tensor],
    dense: Mapping[str, torch.Tensor],
) -> list[Method]:
    mask = SubnetMask.from_dense(dense)
    methods = [
        _fused(start, grads),
        _times_mask(start, grads, dense),
        _gathered(start, grads, dense),
        _ours(start, grads, mask, compact_grads=False),
        _ours(start, grads, mask, compact_grads=True),
    ]
    return [*methods, _fused_masters(start, grads)] if density == 1.0 else methods


def _parameters(start: Mapping[str, torch.Tensor], grads: Mapping[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in start.items()}
    for name, parameter in parameters.items():
        parameter.grad = grads[name]
    return parameters


def _fused(start: Mapping[str, torch.Tensor], grads: Mapping[str, torch.Tensor]) -> Method:
    parameters = list(_parameters(start, grads).values())
    optimizer = torch.optim.AdamW(parameters, fused=True, **_OPTIONS)
    return Method(FUSED, optimizer.step, lambda: _torch_memory(parameters, optimizer))


def _times_mask(
    start: Mapping[str, torch.Tensor], grads: Mapping[str, torch.Tensor], dense: Mapping[str, torch.Tensor]
) -> Method:
    """Mask the gradients in place by bfloat16 masks: no allocation and no conversion, its fastest form."""
    # The other methods share `grads`. Masking once more changes nothing, so these serve every step.
    own = {name: grad.clone() for name, grad in grads.items()}
    masks = {name: chosen.bfloat16() for name, chosen in dense.items()}
    parameters = list(_parameters(start, own).values())
    optimizer = torch.optim.AdamW(parameters, fused=True, **_OPTIONS)

    def step() -> None:
        for name, grad in own.items():
            grad.mul_(masks[name])
        optimizer.step()

    def memory() -> dict[str, int]:
        return {**_torch_memory(parameters, optimizer), "mask": _nbytes(masks.values())}

    return Method(TIMES_MASK, step, memory)


def _gathered(
    start: Mapping[str, torch.Tensor], grads: Mapping[str, torch.Tensor], dense: Mapping[str, torch.Tensor]
) -> Method:
    weights = {name: weight.clone().view(-1) for name, weight in start.items()}
    flat_grads = {name: grad.view(-1) for name, grad in grads.items()}
    indices = {name: chosen.view(-1).nonzero().view(-1) for name, chosen in dense.items()}
    masters = {n: torch.nn.Parameter(weights[n].index_select(0, indices[n]).float()) for n in weights}
    optimizer = torch.optim.AdamW(masters.values(), fused=True, **_OPTIONS)

    def step() -> None:
        for name, master in masters.items():
            master.grad = flat_grads[name].index_select(0, indices[name]).float()
        optimizer.step()
        for name, master in masters.items():
            weights[name].index_copy_(0, indices[name], master.detach().bfloat16())
            master.grad = None

    def memory() -> dict[str, int]:
        return {
            "weights": _nbytes(weights.values()),
            "gradients": _nbytes(grads.values()),
            "moments": _moments(optimizer),
            "masters": _nbytes(masters.values()),
            "mask": _nbytes(indices.values()),
        }

    return Method(GATHERED, step, memory)


def _ours(
    start: Mapping[str, torch.Tensor], grads: Mapping[str, torch.Tensor], mask: SubnetMask, *, compact_grads: bool
) -> Method:
    parameters = _parameters(start, grads)
    optimizer = MaskedAdamW(
        parameters.items(),
        mask,
        max_grad_norm=None,
        nonfinite="ignore",  # none of the others looks for NaN
        compact_grads=compact_grads,
        check_base=False,
        **_OPTIONS,
    )

    def put_gradients() -> None:
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                parameter.grad = grads[name]

    def memory() -> dict[str, int]:
        measured = {"weights": _nbytes(parameters.values()), **optimizer.memory()}
        return measured if compact_grads else {**measured, "gradients": _nbytes(grads.values())}

    def changed() -> float:
        before = [parameter.detach().clone() for parameter in parameters.values()]
        put_gradients()
        optimizer.step()
        pairs = zip(before, parameters.values(), strict=True)
        return sum(int((old != new.detach()).sum()) for old, new in pairs) / mask.num_trainable

    # Compaction consumes `.grad`, so it is put back before every step; that costs nothing worth timing.
    return Method(OURS_COMPACT if compact_grads else OURS_DENSE, optimizer.step, memory, put_gradients, changed)


def _fused_masters(start: Mapping[str, torch.Tensor], grads: Mapping[str, torch.Tensor]) -> Method:
    weights = list(start.values())
    copies = [weight.clone() for weight in weights]
    masters = [torch.nn.Parameter(weight.float()) for weight in weights]
    optimizer = torch.optim.AdamW(masters, fused=True, **_OPTIONS)

    def step() -> None:
        for master, grad in zip(masters, grads.values(), strict=True):
            master.grad = grad.float()
        optimizer.step()
        for master, weight in zip(masters, copies, strict=True):
            weight.copy_(master.detach())
            master.grad = None

    def memory() -> dict[str, int]:
        return {
            "weights": _nbytes(copies),
            "gradients": _nbytes(grads.values()),
            "moments": _moments(optimizer),
            "masters": _nbytes(masters),
        }

    return Method(FUSED_MASTERS, step, memory)


def _torch_memory(parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return {"weights": _nbytes(parameters), "gradients": _nbytes(gradients), "moments": _moments(optimizer)}


def _moments(optimizer: torch.optim.Optimizer) -> int:
    return sum(value.nbytes for values in optimizer.state.values() for key, value in values.items() if key != "step")


def _nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)
