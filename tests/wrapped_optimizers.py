"""Optimizers that the tests of `MaskedOptimizer` wrap, as users write them."""

from __future__ import annotations

from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675), Algorithm 2."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                update = torch.lerp(p.grad, state["exp_avg"], beta1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                state["exp_avg"].lerp_(p.grad, 1 - beta2)


class _Simple(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.25) -> None:
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    self.one(p, group)

    def one(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        p.add_(p.grad, alpha=-group["lr"])


class Counting(_Simple):
    """Counts its steps in the groups."""


class Hoarding(_Simple):
    """Keeps the last gradient itself, not a copy, and steps along the change."""

    def one(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        p.sub_(p.grad - self.state[p].get("previous", 0.0), alpha=group["lr"])
        self.state[p]["previous"] = p.grad


class Failing(_Simple):
    """Fails on an infinite step size, before it changes anything."""

    def one(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        if group["lr"] == float("inf"):
            raise ArithmeticError("infinite step size")
        super().one(p, group)


class EightBit(_Simple):
    """Keeps the momentum in bytes with one scale per 32 elements, its steps as an int and a note."""

    def one(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state, blocks = self.state[p], -(-p.numel() // 32)
        if not state:
            state.update(step=0, note="blocks of 32")
            state["bytes"] = torch.full((p.numel(),), 128, dtype=torch.uint8)
            state["absmax"] = torch.zeros(blocks)
        state["step"] += 1
        scale = state["absmax"].repeat_interleave(32)[: p.numel()]
        momentum = (state["bytes"].float() - 128) / 127 * scale * 0.9 + p.grad
        padded = torch.nn.functional.pad(momentum, (0, blocks * 32 - p.numel()))
        state["absmax"] = padded.view(blocks, 32).abs().amax(dim=1)
        scale = state["absmax"].repeat_interleave(32)[: p.numel()].clamp(min=1e-30)
        state["bytes"] = (momentum / scale * 127).round().add(128).to(torch.uint8)
        p.add_(momentum, alpha=-group["lr"])


class WithList(_Simple):
    """Keeps what no state dict of tensors, numbers and strings can hold."""

    def one(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        self.state[p]["history"] = [p.norm()]


class WithOwnMaster(_Simple):
    """Keeps masters of its own, under the name that the wrapper needs."""

    def one(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        self.state[p]["master"] = p.clone()


class WithStranger(_Simple):
    """Keeps something under no parameter."""

    def one(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        self.state["shared"] = {"norm": p.norm()}  # type: ignore[index]


WRAPPED: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (torch.optim.NAdam, {"weight_decay": 0.1}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.RMSprop, {"centered": True}),
    (torch.optim.Rprop, {}),
    (torch.optim.ASGD, {}),
    (Lion, {"weight_decay": 0.1}),
]
"""Classes and options; every one treats each weight by itself."""
