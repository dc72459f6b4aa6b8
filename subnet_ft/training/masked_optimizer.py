"""The masked form of the optimizer that a trainer asks for."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.errors import TrainerError
from subnet_ft.masks import SubnetMask, by_canonical_name, canonical_name
from subnet_ft.optim import MaskedAdamW, MaskedBase, MaskedOptimizer, MaskedSGD
from subnet_ft.training.options import SubnetOptions, compacts, wanted_optimizer

if TYPE_CHECKING:
    from transformers import Trainer

# Options of torch's optimizers that the kernels have; others go to the wrapped optimizer itself.
_ADAMW = frozenset({"lr", "betas", "eps", "weight_decay", "fused"})
_SGD = frozenset({"lr", "momentum", "weight_decay", "nesterov"})


def build_optimizer(trainer: Trainer, model: torch.nn.Module, mask: SubnetMask, options: SubnetOptions) -> MaskedBase:
    """Build it on all parameters of `model`, with the trainer's groups: no decay where transformers exempts it.

    AdamW and SGD have kernels of their own; every other element-wise optimizer is wrapped.

    Raises:
        TrainerError: An option of `restrict` exists only for optimizers with a kernel.
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
    if optimizer_cls is torch.optim.AdamW and keywords.keys() <= _ADAMW:
        keywords.pop("fused", None)
        keywords = {**_defaults(optimizer_cls, "lr", "betas", "eps"), **keywords}
        return MaskedAdamW(groups, mask, master=options.master, **keywords, **shared)
    if optimizer_cls is torch.optim.SGD and keywords.keys() <= _SGD:
        keywords = {**_defaults(optimizer_cls, "lr", "momentum"), **keywords}
        return MaskedSGD(groups, mask, master=options.master, **keywords, **shared)
    if options.master != "fp32":
        raise TrainerError(
            f"`master={options.master!r}` needs an optimizer with a kernel of its own (AdamW, SGD); the trainer asks "
            f"for `{optimizer_cls.__name__}`, which is wrapped around fp32 masters. Leave `master` at `fp32`."
        )
    return MaskedOptimizer(optimizer_cls, groups, mask, **keywords, **shared)


def _defaults(optimizer_cls: type, *names: str) -> dict[str, Any]:
    """Return what torch's own class would take where an option is left open."""
    parameters = inspect.signature(optimizer_cls).parameters
    return {name: parameters[name].default for name in names}
