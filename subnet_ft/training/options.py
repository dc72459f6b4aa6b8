"""What `restrict` and `SubnetTrainerMixin` can be asked for, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.utils import is_peft_model

from subnet_ft.errors import OptimizerError, TrainerError
from subnet_ft.masks import SubnetMask, by_canonical_name
from subnet_ft.optim import MaskedAdamW, MaskedBase, MaskedSGD
from subnet_ft.optim.clipping import CLIP_NORMS, NONFINITE
from subnet_ft.optim.elementwise import check_elementwise
from subnet_ft.optim.masters import check_master
from subnet_ft.training.delta_checkpoints import check_only_delta
from subnet_ft.training.processes_check import check_one_mask, check_processes

if TYPE_CHECKING:
    from transformers import Trainer


# Methods of a trainer that the mixin replaces without calling them.
_REPLACED = ("create_optimizer", "_clip_grad_norm", "_get_grad_norm")


class Stateful(Protocol):
    """What can be part of a checkpoint: a model, an optimizer, or any object with these two methods."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors, numbers, strings and containers of them."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take the state back."""


@dataclass(frozen=True, kw_only=True)
class SubnetOptions:
    """How a trainer trains its subnetwork; the keywords of `restrict`."""

    master: str = "fp32"
    """How fp32 master weights are kept: `fp32`, `remainder`, `stochastic` or `none` (see `MaskedAdamW`)."""

    compact_grads: bool | None = None
    """Compact every gradient as soon as autograd has it. `None`: yes, unless DDP must reduce dense ones for a norm."""

    clip_norm: str = "masked"
    """What `max_grad_norm` clips on: the norm of the `masked` gradient, or of the `full` one, as a full run does."""

    log_norms: bool = False
    """Log `grad_norm_masked` and `grad_norm_full` beside `grad_norm`, which is the one that clipping goes by."""

    nonfinite: str = "raise"
    """What a step does with a NaN or infinite gradient: `raise`, `skip` or `ignore`."""

    audit_steps: int | None = None
    """Compare the weights outside the mask bit by bit every so many steps, and at the end; `None`: never."""

    free_reference: bool = False
    """Take the reference model from the policy with its base's values swapped in, instead of holding a second one."""

    save_only_delta: bool = False
    """Let checkpoints hold a delta of the base, `model.delta.safetensors`, instead of the dense weights."""

    save_total_bytes: int | None = None
    """Keep as many checkpoints as fit into so many bytes; the newest and the best one stay. `None`: do not look."""

    extras: Mapping[str, Stateful] = field(default_factory=dict)
    """What else is trained beside the model, by name: saved with every checkpoint, and loaded again."""


def check(trainer: Trainer, mask: SubnetMask, options: SubnetOptions) -> None:
    """Refuse what cannot go together, before anything is changed.

    Raises:
        ValueError: An option is out of range.
        TrainerError: The trainer cannot be served, or not with these options.
        MaskMismatchError: The mask belongs to another model, or to another base.
    """
    _check_trainer(trainer)
    _check_options(trainer, options)
    if options.save_only_delta:
        check_only_delta(trainer)
    check_one_mask(mask)
    model: Any = trainer.model
    if loads_later(trainer):
        mask.check_shapes({name: tuple(p.shape) for name, p in by_canonical_name(model.named_parameters()).items()})
    else:
        mask.check(model)
    if is_peft_model(model):
        frozen = [name for name, p in by_canonical_name(model.named_parameters()).items() if not p.requires_grad]
        lost = [name for name in frozen if mask.tensors[name].count]
        if lost:
            raise TrainerError(
                f"The mask trains `{lost[0]}`, which PEFT freezes and leaves out of every checkpoint ({len(lost)} such "
                "tensors). Restrict the adapters only, or train the model without PEFT."
            )


def _check_options(trainer: Trainer, options: SubnetOptions) -> None:
    check_master(options.master)
    if options.clip_norm not in CLIP_NORMS:
        raise ValueError(f"`clip_norm` must be one of {', '.join(CLIP_NORMS)}, got {options.clip_norm!r}")
    if options.nonfinite not in NONFINITE:
        raise ValueError(f"`nonfinite` must be one of {', '.join(NONFINITE)}, got {options.nonfinite!r}")
    if options.audit_steps is not None and options.audit_steps < 1:
        raise ValueError(f"`audit_steps` must be >= 1, or None for no audits, got {options.audit_steps}")
    if options.save_total_bytes is not None and options.save_total_bytes < 1:
        raise ValueError(f"`save_total_bytes` must be >= 1, or None for no limit, got {options.save_total_bytes}")
    optimizer_cls, keywords = wanted_optimizer(trainer)
    if options.master != "fp32" and kernel_of(optimizer_cls, keywords) is None:
        raise TrainerError(
            f"`master={options.master!r}` needs an optimizer with a kernel of its own (AdamW, SGD); the trainer asks "
            f"for `{optimizer_cls.__name__}`, which is wrapped around fp32 masters. Leave `master` at `fp32`."
        )
    args = trainer.args
    asked = "`clip_norm='full'`" if options.clip_norm == "full" else "`log_norms=True`"
    if _wants_full(options) and options.compact_grads and is_replicated(trainer) and args.world_size > 1:
        raise TrainerError(
            f"{asked} needs the dense gradients of all {args.world_size} processes, which exchange compact ones. Leave "
            "`compact_grads` at None, or set it to False."
        )
    if _wants_full(options) and compacts(trainer, options) and args.gradient_accumulation_steps > 1:
        raise TrainerError(
            f"{asked} needs the dense gradient of the whole step, and with compact gradients only that of one "
            f"micro-batch ever stands whole; `gradient_accumulation_steps` is {args.gradient_accumulation_steps}. Pass "
            "`compact_grads=False`, or take one micro-batch per step."
        )


def kernel_of(optimizer_cls: type, keywords: Mapping[str, Any]) -> type[MaskedAdamW] | type[MaskedSGD] | None:
    """Return the masked class whose kernel does what an optimizer with these options does, if there is one."""
    if optimizer_cls is torch.optim.AdamW and keywords.keys() <= {"lr", "betas", "eps", "weight_decay", "fused"}:
        return MaskedAdamW
    if optimizer_cls is torch.optim.SGD and keywords.keys() <= {"lr", "momentum", "weight_decay", "nesterov"}:
        return MaskedSGD
    return None


def compacts(trainer: Trainer, options: SubnetOptions) -> bool:
    """Say whether gradients are compacted as soon as autograd has them."""
    if options.compact_grads is not None:
        return options.compact_grads
    return not (_wants_full(options) and is_replicated(trainer))


def is_replicated(trainer: Trainer) -> bool:
    """Say whether DDP will wrap the model; a launcher of several processes does so also when it started only one."""
    is_launched = str(getattr(trainer.args.parallel_mode, "value", "")) == "distributed"
    return is_launched and not trainer.is_fsdp_enabled


def loads_later(trainer: Trainer) -> bool:
    """Say whether only one process holds the weights until FSDP2 has sharded the model."""
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return bool(trainer.is_fsdp_enabled and plugin.cpu_ram_efficient_loading)


def _wants_full(options: SubnetOptions) -> bool:
    return options.clip_norm == "full" or options.log_norms


def _check_trainer(trainer: Trainer) -> None:
    args = trainer.args
    if trainer.model_init is not None:
        raise TrainerError(
            "The trainer builds a new model with `model_init` when training starts, and a mask belongs to one model. "
            "Pass `model` instead."
        )
    if trainer.optimizer is not None:
        raise TrainerError(
            f"The trainer already has an optimizer, {type(trainer.optimizer).__name__}. Call `restrict` before "
            "`train()`, and do not pass `optimizers` to the trainer."
        )
    if args.fp16:
        raise TrainerError(
            "`fp16=True` scales gradients behind the optimizer's back. Load the model in bfloat16 instead."
        )
    check_processes(trainer)
    for method in _REPLACED:
        own = _own_method(type(trainer), method)
        if own is not None:
            raise TrainerError(
                f"`{own.__name__}` has a `{method}` of its own, and that of the masked optimizer would replace it. "
                "Leave the method out, or use a masked optimizer there yourself, without `restrict`."
            )
    wanted = str(getattr(args.optim, "value", args.optim))
    optimizer_cls, keywords = wanted_optimizer(trainer)
    reason = "it is built from the whole model" if {"params", "model", "optimizer_dict"} & keywords.keys() else None
    if not isinstance(optimizer_cls, type):
        reason = "it is made by a factory"
    elif issubclass(optimizer_cls, MaskedBase):
        reason = "it is masked already, and `restrict` builds its own"
    if reason is not None:
        raise TrainerError(
            f"The trainer asks for the optimizer `{wanted}`, which cannot run on the weights of a mask: {reason}. "
            "Choose an element-wise one, such as `adamw_torch`."
        )
    try:
        check_elementwise(optimizer_cls)
    except OptimizerError as error:
        raise TrainerError(f"The trainer asks for the optimizer `{wanted}`. {error}") from error


def _own_method(trainer_class: type, method: str) -> type | None:
    """Return the class whose method would be passed over, if it is neither transformers' nor TRL's."""
    from subnet_ft.training.checkpoint_mixin import CheckpointMixin

    # What a class does after the mixin is in force, and calls it by `super()`.
    passed_over = [base for base in trainer_class.__mro__ if not issubclass(base, CheckpointMixin)]
    first = next(base for base in passed_over if method in vars(base))
    return None if first.__module__.partition(".")[0] in ("transformers", "trl") else first


def wanted_optimizer(trainer: Trainer) -> tuple[Any, dict[str, Any]]:
    """Return the class and the options of the optimizer that the trainer would build."""
    given = trainer.optimizer_cls_and_kwargs
    model: Any = trainer.model
    optimizer_cls, keywords = given or trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    return optimizer_cls, dict(keywords)
