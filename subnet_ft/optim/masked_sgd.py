"""`MaskedSGD`: SGD on the weights of a mask, and on no other; without momentum it has no state but the masters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

import subnet_kernels
from subnet_ft.masks import SubnetMask
from subnet_ft.optim.fused import FusedBase
from subnet_ft.optim.parameters import NamedParameters
from subnet_kernels import SGDUpdate


class MaskedSGD(FusedBase):
    """SGD that trains the weights of a mask; a weight outside it keeps its bits, whatever happens.

    Plain SGD is often enough in RL (arXiv 2602.07729), and saves the moments. What `MaskedAdamW` says about gradients,
    masters, skipped tensors and `requires_grad` holds here, too.

    Args:
        named_parameters: Pairs of name and parameter, or dicts with those pairs under `params` and options of their own
            (`lr`, `momentum`, `weight_decay`, `nesterov`). All parameters of the model.
        mask: Which weights to train.
        lr: Step size, >= 0.
        momentum: Decay rate of the momentum buffer, in [0, 1); 0 keeps none.
        weight_decay: L2 rate, >= 0, added to the gradient as in `torch.optim.SGD`, on the mask only.
        nesterov: Nesterov's momentum; needs `momentum`.
        max_grad_norm, clip_norm, measure_full_norm, nonfinite, master, seed, compact_grads, check_base: As in
            `MaskedAdamW`.

    Raises:
        MaskMismatchError: Names, shapes, dtypes or weights are not those of the mask.
        GradientError: Another optimizer compacts the gradients already, or processes train together.
        ValueError: A hyper-parameter is out of range.

    Source: torch.optim.SGD without dampening.
    """

    def __init__(
        self,
        named_parameters: NamedParameters | Iterable[dict[str, Any]],
        mask: SubnetMask,
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        max_grad_norm: float | None,
        clip_norm: str = "masked",
        measure_full_norm: bool = False,
        nonfinite: str = "raise",
        master: str = "fp32",
        seed: int = 0,
        compact_grads: bool = True,
        check_base: bool = True,
    ) -> None:
        super().__init__(
            named_parameters,
            mask,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov},
            max_grad_norm=max_grad_norm,
            clip_norm=clip_norm,
            measure_full_norm=measure_full_norm,
            nonfinite=nonfinite,
            master=master,
            seed=seed,
            compact_grads=compact_grads,
            check_base=check_base,
        )

    def _check_options(self, group: Mapping[str, Any]) -> None:
        if not group["lr"] >= 0.0:
            raise ValueError(f"`lr` must be >= 0, got {group['lr']}")
        if not 0.0 <= group["momentum"] < 1.0:
            raise ValueError(f"`momentum` must lie in [0, 1), got {group['momentum']}")
        if not group["weight_decay"] >= 0.0:
            raise ValueError(f"`weight_decay` must be >= 0, got {group['weight_decay']}")
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("`nesterov` needs a `momentum` above 0")

    def _moments(self, group: Mapping[str, Any]) -> Sequence[str]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _describe(
        self, group: Mapping[str, Any], values: Mapping[str, Any], step: int, shared: dict[str, Any]
    ) -> SGDUpdate:
        return SGDUpdate(
            momentum_buffer=values.get("momentum_buffer"),
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            **shared,
        )

    def _run(self, updates: list[SGDUpdate], grad_scale: torch.Tensor | None, cache: dict[Any, Any]) -> None:
        subnet_kernels.masked_sgd(updates, grad_scale=grad_scale, cache=cache)
