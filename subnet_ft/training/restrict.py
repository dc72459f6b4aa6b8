"""`restrict`: turn a built trainer into a subnetwork trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from subnet_ft.errors import TrainerError
from subnet_ft.masks import SubnetMask, by_canonical_name, canonical_name
from subnet_ft.optim import MaskedAdamW

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

TrainerT = TypeVar("TrainerT", bound="Trainer")

# What the trainer would have built by itself is AdamW in some form; another choice must not vanish silently.
_ADAMW_NAMES = ("adamw_torch", "adamw_torch_fused")


def restrict(
    trainer: TrainerT, mask: SubnetMask, *, master: str = "fp32", compact_grads: bool | None = None
) -> TrainerT:
    """Make `trainer.train()` train only the weights of `mask`; call it once, on a built trainer that has not started.

    The trainer's own arguments set the hyper-parameters: learning rate, betas, epsilon, weight decay (not on the
    parameters that transformers exempts), schedule and `max_grad_norm`, which clips on the norm of the masked gradient;
    `grad_norm` in the logs is that norm. A mask in which everything is trainable gives a full run with the same code.

    Args:
        trainer: A `transformers.Trainer`, or a trainer of TRL.
        mask: Which weights to train; must have been made for the model that the trainer holds.
        master: How fp32 master weights are kept: `fp32`, `remainder` or `stochastic` (see `MaskedAdamW`).
        compact_grads: Free every dense gradient as soon as autograd has it (see `MaskedAdamW`). `None`: yes in one
            process; no under DDP, which reduces dense gradients.

    Returns:
        The same trainer.

    Raises:
        MaskMismatchError: The mask belongs to another model, or to another base.
        TrainerError: The trainer is set up in a way that a masked optimizer cannot serve. Also when training starts, if
            it got another optimizer in the meantime.
    """
    _refuse_what_would_break(trainer)
    own_model: Any = trainer.model
    mask.check(own_model)
    built: list[MaskedAdamW] = []

    def create_optimizer(model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if trainer.model is not own_model:
            raise TrainerError(
                "The trainer got another model after `restrict`, which would stay untrained. Give the trainer its "
                "model first, and call `restrict` last."
            )
        if built:
            # A run that was broken off leaves the gradients of its last micro-batches; the trainer drops only `.grad`.
            built[0].zero_grad()
        if trainer.optimizer is None:
            # Built when training starts, because other tools replace parameter objects before that. A resumed run
            # already holds trained weights then, so the base was checked above.
            for earlier in built:
                earlier.release()  # the trainer dropped it, as a retry with smaller batches does
            target: Any = own_model if model is None else model
            built[:] = [_build(trainer, target, mask, master, compact_grads)]
            trainer.optimizer = built[0]
        # A second `train()` finds the optimizer of the first in the wrapper that accelerate put around it.
        elif not built or getattr(trainer.optimizer, "optimizer", trainer.optimizer) is not built[0]:
            raise TrainerError(
                f"The trainer got an optimizer, {type(trainer.optimizer).__name__}, after `restrict`, which builds its "
                "own. Do not set `trainer.optimizer`."
            )
        return trainer.optimizer

    def clip_grad_norm(model: torch.nn.Module) -> torch.Tensor:
        return built[0].clip_grad_norm_(trainer.args.max_grad_norm)

    def get_grad_norm(model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        return built[0].grad_norm() if grad_norm is None else grad_norm

    hooked: Any = trainer  # instance attributes shadow the methods of the same name
    hooked.create_optimizer = create_optimizer
    hooked._clip_grad_norm = clip_grad_norm
    hooked._get_grad_norm = get_grad_norm
    hooked._restricted_to = mask
    return trainer


def _build(
    trainer: Trainer, model: torch.nn.Module, mask: SubnetMask, master: str, compact_grads: bool | None
) -> MaskedAdamW:
    args = trainer.args
    decayed = {canonical_name(name) for name in trainer.get_decay_parameter_names(model)}
    pairs = list(by_canonical_name(model.named_parameters()).items())
    groups: list[dict[str, Any]] = [
        {"params": [pair for pair in pairs if pair[0] in decayed], "weight_decay": args.weight_decay},
        {"params": [pair for pair in pairs if pair[0] not in decayed], "weight_decay": 0.0},
    ]
    return MaskedAdamW(
        [group for group in groups if group["params"]],
        mask,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        max_grad_norm=None,
        master=master,
        compact_grads=args.world_size == 1 if compact_grads is None else compact_grads,
        check_base=False,
    )


def _refuse_what_would_break(trainer: Trainer) -> None:
    args = trainer.args
    earlier: SubnetMask | None = getattr(trainer, "_restricted_to", None)
    if earlier is not None:
        raise TrainerError(
            f"The trainer is already restricted to mask {earlier.fingerprint[:16]} (density {earlier.density:.4g}). "
            "Build a new trainer for another mask."
        )
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
    wanted = str(getattr(args.optim, "value", args.optim))
    if getattr(trainer, "optimizer_cls_and_kwargs", None) is not None or wanted not in _ADAMW_NAMES:
        raise TrainerError(
            f"The trainer asks for the optimizer `{wanted}`, which `restrict` would replace by MaskedAdamW. "
            "Leave `optim` and `optimizer_cls_and_kwargs` at their defaults."
        )
    if args.fp16:
        raise TrainerError(
            "`fp16=True` scales gradients behind the optimizer's back. Load the model in bfloat16 instead."
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise TrainerError(
            "This release restricts trainers on one process or under DDP; DeepSpeed flattens parameters, and sharded "
            "parameters need sharded masks."
        )
