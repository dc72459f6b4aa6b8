"""The masked form of the optimizer that a trainer asks for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.masks import SubnetMask, by_canonical_name, canonical_name
from subnet_ft.optim import MaskedAdamW, MaskedBase, MaskedOptimizer, MaskedSGD
from subnet_ft.training.options import SubnetOptions, compacts, kernel_of, wanted_optimizer

if TYPE_CHECKING:
    from transformers import Trainer

_HYPER_PARAMETERS: dict[type, tuple[str, ...]] = {MaskedAdamW: ("lr", "betas", "eps"), MaskedSGD: ("lr", "momentum")}


def build_optimizer(trainer: Trainer, model: torch.nn.Module, mask: SubnetMask, options: SubnetOptions) -> MaskedBase:
    """Build it on all parameters of `model`, with the trainer's groups: no decay where transformers exempts it.

    AdamW and SGD have kernels of their own; every other element-wise optimizer is wrapped.
    """
    decayed = {canonical_name(name) for name in trainer.get_decay_parameter_names(model)}
    pairs = list(by_canonical_name(model.named_parameters()).items())
    groups: list[dict[str, Any]] = [
        {"params": [pair for pair in pairs if pair[0] in decayed], "weight_decay": trainer.args.weight_decay},
        {"params": [pair for pair in pairs if pair[0] not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer_cls, keywords = wanted_optimizer(trainer)
    shared: dict[str, Any] = {
        "max_grad_norm": None,
        "clip_norm": options.clip_norm,
        "measure_full_norm": options.log_norms,
        "nonfinite": options.nonfinite,
        "compact_grads": compacts(trainer, options),
        # A resumed run already holds trained weights; the base was checked when the trainer was restricted.
        "check_base": False,
    }
    kernel = kernel_of(optimizer_cls, keywords)
    if kernel is not None:
        keywords.pop("fused", None)
        keywords = {**_defaults(optimizer_cls, _HYPER_PARAMETERS[kernel]), **keywords}
        return kernel(groups, mask, master=options.master, **keywords, **shared)
    return MaskedOptimizer(optimizer_cls, groups, mask, **keywords, **shared)


def _defaults(optimizer_cls: type, names: Iterable[str]) -> dict[str, Any]:
    """Return what torch's own class would take where an option is left open."""
    parameters = inspect.signature(optimizer_cls).parameters
    return {name: parameters[name].default for name in names}
