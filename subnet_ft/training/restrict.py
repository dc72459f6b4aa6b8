"""`restrict`: turn a built trainer into a subnetwork trainer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from subnet_ft.errors import TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.training.free_reference import take_reference_from_policy
from subnet_ft.training.mixin import SubnetTrainerMixin
from subnet_ft.training.options import Stateful, SubnetOptions, check

if TYPE_CHECKING:
    from transformers import Trainer

TrainerT = TypeVar("TrainerT", bound="Trainer")


def restrict(
    trainer: TrainerT,
    mask: SubnetMask,
    *,
    master: str = "fp32",
    compact_grads: bool | None = None,
    clip_norm: str = "masked",
    log_norms: bool = False,
    nonfinite: str = "raise",
    audit_steps: int | None = None,
    free_reference: bool = False,
    save_only_delta: bool = False,
    save_total_bytes: int | None = None,
    extras: Mapping[str, Stateful] | None = None,
) -> TrainerT:
    """Make `trainer.train()` train only the weights of `mask`; call it once, on a built trainer that has not started.

    The trainer's own arguments set the hyper-parameters: optimizer, learning rate, betas, epsilon, weight decay (not on
    the parameters that transformers exempts), schedule and `max_grad_norm`, which clips on the norm of the masked
    gradient; `grad_norm` in the logs is that norm. A mask in which everything is trainable gives a full run with the
    same code. The trainer's class becomes that of a `SubnetTrainerMixin` before its own.

    Args:
        trainer: A `transformers.Trainer`, or a trainer of TRL; docs/trainers.md lists those that are tested.
        mask: Which weights to train; must have been made for the model that the trainer holds.
        master: How fp32 master weights are kept: `fp32`, `remainder`, `stochastic` or `none` (see `MaskedAdamW`).
        compact_grads: Compact every gradient as soon as autograd has it; under DDP the processes then exchange compact
            gradients. `None`: yes, but under DDP not where `clip_norm` or `log_norms` need the whole gradient.
        clip_norm: `masked`: `max_grad_norm` clips on the norm of the gradient on the mask. `full`: on that of the whole
            gradient, as a full run does; with compact gradients one micro-batch per step is needed then.
        log_norms: Log `grad_norm_masked` and `grad_norm_full` beside `grad_norm`, under the same condition.
        nonfinite: What a step does with a NaN or infinite gradient: `raise`, `skip` it whole, or `ignore`.
        audit_steps: Compare the weights outside the mask bit by bit every so many steps, and at the end.
        free_reference: Let the policy with its base's values swapped in be the reference model of DPO, KTO, GRPO, RLOO,
            PPO and PRIME, to the same bits; the second model that the trainer holds is dropped.
        save_only_delta: Let checkpoints hold `model.delta.safetensors`, a delta of the base, instead of dense weights.
        save_total_bytes: Keep as many checkpoints as fit into so many bytes, beside `save_total_limit`: the oldest go
            first, the newest and the best one stay.
        extras: What else is trained beside the model (a value model, its optimizer), by name: anything with
            `state_dict` and `load_state_dict` that torch loads with `weights_only=True`. Part of every checkpoint.

    Returns:
        The same trainer.

    Raises:
        MaskMismatchError: The mask belongs to another model, or to another base.
        TrainerError: The trainer is set up in a way that a masked optimizer cannot serve. Also when training starts, if
            it got another optimizer in the meantime.
    """
    if isinstance(trainer, SubnetTrainerMixin):
        earlier = trainer.subnet_mask
        raise TrainerError(
            f"The trainer is already restricted to mask {earlier.fingerprint[:16]} (density {earlier.density:.4g}). "
            "Build a new trainer for another mask, or add a `MaskSchedule`."
        )
    options = SubnetOptions(
        master=master,
        compact_grads=compact_grads,
        clip_norm=clip_norm,
        log_norms=log_norms,
        nonfinite=nonfinite,
        audit_steps=audit_steps,
        free_reference=free_reference,
        save_only_delta=save_only_delta,
        save_total_bytes=save_total_bytes,
        extras=dict(extras or {}),
    )
    check(trainer, mask, options)
    if free_reference:
        take_reference_from_policy(trainer, mask)
    swapped: Any = trainer
    own_class: Any = type(trainer)
    swapped.__class__ = _subnet_class(own_class)
    swapped._begin_subnet(mask, options)
    return trainer


@functools.cache
def _subnet_class(trainer_class: type) -> type:
    return type(
        f"Subnet{trainer_class.__name__}",
        (SubnetTrainerMixin, trainer_class),
        {"__module__": trainer_class.__module__, "__doc__": trainer_class.__doc__},
    )
