"""A reference model without weights of its own: the policy computes, with the values of its base under the mask."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import subnet_kernels
from subnet_ft.checkpoints.listing import listing
from subnet_ft.deltas.swap import WeightSwap
from subnet_ft.errors import MaskMismatchError, TrainerError
from subnet_ft.masks import SubnetMask, by_canonical_name
from subnet_ft.training.unwrap import unwrapped
from subnet_kernels import BitMask

if TYPE_CHECKING:
    from transformers import Trainer


class FreeReference(torch.nn.Module):
    """Called like a model, it computes what the policy did at its base: in eval mode, without gradients.

    Invariant: outside of a call the policy is untouched, version counters and modes of modules included, so that a
    backward pass may follow whose forward pass came before. It holds one value for every weight of the mask, and has no
    parameters.

    Args:
        policy: The model that is trained; what wraps it (DDP) is not asked, and nothing is exchanged between processes.
        swap: Values of the base, for the policy.
    """

    def __init__(self, policy: torch.nn.Module, swap: WeightSwap) -> None:
        super().__init__()
        # Not a submodule: its parameters are not this one's.
        self._policy = (policy,)
        self._swap = swap
        self.eval()

    @property
    def nbytes(self) -> int:
        """Bytes that it holds: the values of the base, and the mask that says where they belong."""
        return self._swap.nbytes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the policy returns with the weights of its base."""
        (policy,) = self._policy
        with torch.no_grad(), _in_eval_mode(policy), self._swap.inside():
            return policy(*args, **kwargs)


def take_reference_from_policy(trainer: Trainer, mask: SubnetMask) -> FreeReference:
    """Replace the trainer's reference model by the policy itself, which holds its base's values beside it.

    The second model, which the trainer's constructor loaded, is dropped; instead of all its weights, those under the
    mask are kept. Losses are the same to the last bit. Call it on a built trainer that has not started, before or after
    `restrict`; a run that resumes does the same, and then loads its weights.

    Args:
        trainer: One with a frozen model of the policy's base as `ref_model`: DPO, KTO, and GRPO, RLOO, PPO with a KL
            term, PRIME. In-out.
        mask: Every weight that will be trained: the trainer's mask, or the union of all masks of a `MaskSchedule`.

    Returns:
        What is now `trainer.ref_model`.

    Raises:
        TrainerError: The trainer has no such model, or uses it in a way that needs a model of its own.
        MaskMismatchError: The policy and its reference model differ outside the mask, or the mask is of another model.
    """
    reference: Any = getattr(trainer, "ref_model", None)
    _check_trainer(trainer, reference)
    accelerator: Any = trainer.accelerator
    policy: Any = accelerator.unwrap_model(trainer.model)
    second: Any = accelerator.unwrap_model(reference)
    swap = _base_values(policy, second, mask)
    free = FreeReference(policy, swap)
    holder: Any = trainer
    holder.ref_model = free
    accelerator._models = [model for model in accelerator._models if model is not reference and model is not second]
    trainer.add_callback(_MaskIsHeld(mask))
    del reference, second
    gc.collect()  # TRL's fused head and accelerate's autocast tie a model to itself
    return free


class _MaskIsHeld(TrainerCallback):
    """Refuses to train a weight of which no base value is held, before it changes.

    Args:
        held: The weights whose base values are held.
    """

    def __init__(self, held: SubnetMask) -> None:
        self._held = held
        self._last: SubnetMask | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the mask that training starts with."""
        self._check(kwargs["optimizer"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check a mask that has changed since the last step."""
        self._check(kwargs["optimizer"])

    def _check(self, optimizer: Any) -> None:
        mask = unwrapped(optimizer).mask
        if mask is self._last:
            return
        outside = (mask - self._held).num_trainable if mask.fingerprint != self._held.fingerprint else 0
        if outside:
            raise TrainerError(
                f"The optimizer trains {outside:,} weights whose base values the free reference does not hold, so it "
                "would follow the policy there. Call `take_reference_from_policy(trainer, union)` with the union of "
                "all masks of the run (`first | second`) before training."
            )
        self._last = mask


@contextlib.contextmanager
def _in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every module of the model is in eval mode; afterwards, each in the one that it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _check_trainer(trainer: Any, reference: Any) -> None:
    name = type(trainer).__name__
    if isinstance(reference, FreeReference):
        raise TrainerError("The trainer's reference is its policy already. Build a new trainer for another mask.")
    if not isinstance(reference, torch.nn.Module):
        raise TrainerError(
            f"`{name}` holds no reference model (`ref_model` is {reference}), so there is none to spare: it needs none "
            "(no KL term, precomputed log-probabilities), or takes it from the base under an adapter. Leave the free "
            "reference out."
        )
    if getattr(trainer.args, "sync_ref_model", False):
        raise TrainerError(
            "`sync_ref_model=True` moves the reference model along with the policy, and the base under a mask stays "
            "as it is. Set `sync_ref_model=False`, or leave the free reference out."
        )
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(trainer, "is_fsdp_enabled", False):
        raise TrainerError(
            "The weights are sharded (FSDP, DeepSpeed) when training starts, after base values were taken from whole "
            "tensors. Train with DDP or in one process, or leave the free reference out: its second model is sharded "
            "too."
        )
    is_compiled = any(isinstance(model, torch._dynamo.OptimizedModule) for model in (trainer.model, reference))
    if is_compiled or trainer.args.torch_compile:
        raise TrainerError(
            "A compiled policy may compute differently with and without gradients, so that its reference would not be "
            "the base to the last bit. Set `torch_compile=False`, or leave the free reference out."
        )
    if trainer.state.global_step:
        raise TrainerError(
            f"The trainer is at step {trainer.state.global_step}. Take the reference before training starts."
        )


def _base_values(policy: Any, second: Any, mask: SubnetMask) -> WeightSwap:
    """Return the values of the second model under the mask, after a check that all the rest is the policy's."""
    weights, others = (by_canonical_name(model.named_parameters()) for model in (policy, second))
    mask.check_shapes({name: tuple(parameter.shape) for name, parameter in weights.items()})
    odd = sorted(weights.keys() ^ others.keys())
    if odd:
        raise MaskMismatchError(
            f"The policy and its reference model have different parameters: {listing(odd)}. A reference that is held "
            "differently, in 8 bits for instance, needs a model of its own; leave the free reference out."
        )
    attention = [getattr(model.config, "_attn_implementation", None) for model in (policy, second)]
    if type(policy) is not type(second) or attention[0] != attention[1]:
        raise MaskMismatchError(
            f"The policy is a {type(policy).__name__} with attention `{attention[0]}`, its reference model a "
            f"{type(second).__name__} with `{attention[1]}`: they compute differently. Load both alike, or leave the "
            "free reference out."
        )
    for name, weight in weights.items():
        _check_same(name, weight.detach(), others[name].detach(), mask)
    buffers = dict(second.named_buffers())
    for name, buffer in policy.named_buffers():
        other = buffers.get(name)
        if other is None or other.dtype != buffer.dtype or not torch.equal(other, buffer):
            raise MaskMismatchError(
                f"The buffer `{name}` of the policy is not that of its reference model, so they compute differently. "
                "Load both alike (`from_pretrained(..., dtype=...)`, not `.to(dtype)` after it), or leave the free "
                "reference out."
            )

    def values(name: str) -> torch.Tensor:
        weight = others[name].detach()
        bits = BitMask.from_bits(mask.tensors[name].bits, weight.numel(), weight.device)
        return subnet_kernels.gather(weight.view(-1), bits, dtype=weight.dtype)

    return WeightSwap(policy, weights, mask, values, name="the reference")


def _check_same(name: str, weight: torch.Tensor, other: torch.Tensor, mask: SubnetMask) -> None:
    """Compare one tensor of the policy with that of its reference model outside the mask."""
    found, expected = ((t.dtype, tuple(t.shape), t.device) for t in (weight, other))
    if found != expected or not (weight.is_contiguous() and other.is_contiguous()):
        raise MaskMismatchError(
            f"`{name}` is {found[0]} of shape {found[1]} on {found[2]} in the policy, and {expected[0]} of shape "
            f"{expected[1]} on {expected[2]} in its reference model. Load both alike, or leave the free reference out."
        )
    bits = BitMask.from_bits(mask.tensors[name].full_bits(), weight.numel(), weight.device)
    if subnet_kernels.fingerprint(weight, outside=bits) != subnet_kernels.fingerprint(other, outside=bits):
        raise MaskMismatchError(
            f"`{name}` differs between the policy and its reference model in weights that the mask does not train. "
            "Both must come from one base; a reference that is another model needs weights of its own."
        )
