"""`MaskedAdamW`: AdamW with fp32 masters on the weights of a mask, and on no other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

import subnet_kernels
from subnet_ft.masks import SubnetMask
from subnet_ft.optim.fused import FusedBase
from subnet_ft.optim.parameters import NamedParameters
from subnet_kernels import AdamWUpdate


class MaskedAdamW(FusedBase):
    """AdamW that trains the weights of a mask; a weight outside it keeps its bits, whatever happens.

    Moments are float32 and compact, `(K,)` per tensor. Weights below float32 also have float32 masters, so that updates
    smaller than a weight's rounding step add up. With a full mask this is plain AdamW.

    Building it sets `requires_grad` of every tensor: False without a trainable weight, True with one. DDP decides when
    it wraps a model which gradients it reduces: build the optimizer before that, unless `requires_grad` fits already.

    A tensor that got no gradient since the last step is skipped whole: no decay, no momentum, no step count. Gradients
    outside the mask, NaN included, are never read. Weights that somebody else changes between two steps are overwritten
    by their master at the next one; a change through `.data`, which torch does not record, only where the rounding of
    the master changes.

    Args:
        named_parameters: Pairs of name and parameter, or dicts with those pairs under `params` and options of their own
            (`lr`, `betas`, `eps`, `weight_decay`). All parameters of the model: the mask names each of them.
        mask: Which weights to train.
        lr: Step size, >= 0.
        betas: Decay rates of the moments, each in [0, 1).
        eps: Added to the denominator, > 0.
        weight_decay: Decoupled decay rate, >= 0, applied on the mask only.
        max_grad_norm: Every step clips the gradient on the mask to this norm; `None` does not clip. A trainer that
            clips by itself sees no `.grad` and cannot know the masked norm: `restrict` hooks it, and a loop of your own
            calls `clip_grad_norm_`.
        clip_norm: `masked`: the norm that clipping goes by is that of the gradient on the mask. `full`: that of the
            whole gradient, as a full run clips; tensors in which nothing is trained then keep their `requires_grad`,
            and with compact gradients each tensor may get one gradient per step (one micro-batch, one process).
        measure_full_norm: Let `grad_norms()` return both norms, under the conditions of `full`.
        nonfinite: What a step does with a gradient that is NaN or infinite on the mask (or in the norm that clipping
            goes by): `raise` an error, `skip` the step whole with a warning, or `ignore` it.
        master: `fp32`, `remainder`, `stochastic` or `none`; see `subnet_ft.optim.masters.MASTERS`.
        seed: Of the random bits of `stochastic`; the same on every replica.
        compact_grads: Compact every gradient as soon as autograd has accumulated it, and free the dense one: gradients
            then take 4 bytes per trainable weight, and micro-batches add up in float32. False where something else
            must see `.grad`, such as DDP.
        check_base: Compare the weights with the base that the mask was made for. Switch it off only when the weights
            are already those of a run in progress, and a check was made before.

    Raises:
        MaskMismatchError: Names, shapes, dtypes or weights are not those of the mask.
        GradientError: Another optimizer compacts the gradients already, or processes train together.
        ValueError: A hyper-parameter is out of range.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), Algorithm 2.
    """

    def __init__(
        self,
        named_parameters: NamedParameters | Iterable[dict[str, Any]],
        mask: SubnetMask,
        *,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
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
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
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
        if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
            raise ValueError(f"`betas` must lie in [0, 1), got {group['betas']}")
        if not group["eps"] > 0.0:
            raise ValueError(f"`eps` must be > 0, got {group['eps']}")
        if not group["weight_decay"] >= 0.0:
            raise ValueError(f"`weight_decay` must be >= 0, got {group['weight_decay']}")

    def _moments(self, group: Mapping[str, Any]) -> Sequence[str]:
        return ("exp_avg", "exp_avg_sq")

    def _describe(
        self, group: Mapping[str, Any], values: Mapping[str, Any], step: int, shared: dict[str, Any]
    ) -> AdamWUpdate:
        return AdamWUpdate(
            exp_avg=values["exp_avg"],
            exp_avg_sq=values["exp_avg_sq"],
            betas=group["betas"],
            eps=group["eps"],
            step=step,
            **shared,
        )

    def _run(self, updates: list[AdamWUpdate], grad_scale: torch.Tensor | None, cache: dict[Any, Any]) -> None:
        subnet_kernels.masked_adamw(updates, grad_scale=grad_scale, cache=cache)
