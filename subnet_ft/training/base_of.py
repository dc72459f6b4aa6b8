"""The base under an adapter: computed by the model itself with the adapter switched off, or copied out of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from subnet_ft.errors import TrainerError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@contextlib.contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Inside, the model computes what its base does, bit by bit, in eval mode; afterwards it is what it was.

    Args:
        model: In-out. PEFT lets all of an adapter train when it switches it on again; what stood still still does.
    """
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(was_training)
        for parameter, does_train in trains.items():
            parameter.requires_grad_(does_train)


class BaseOf:
    """Called like a model, it computes what the base of a policy does: no gradients, and no weights of its own.

    Args:
        policy: A model with an adapter.
    """

    def __init__(self, policy: PeftModel) -> None:
        self._policy = policy

    def __call__(self, **inputs: Any) -> Any:
        """Return the base's outputs."""
        import torch

        with torch.no_grad(), adapter_off(self._policy):
            return self._policy(**inputs)


def base_of(model: PeftModel) -> PreTrainedModel:
    """Return a copy of the model under an adapter, every weight of it trainable; it shares nothing with `model`.

    Raises:
        TrainerError: The base is quantized, so that its weights cannot be trained.
    """
    if getattr(model.get_base_model(), "is_quantized", False):
        raise TrainerError(
            "The policy's base is quantized, and the model that is trained beside the policy starts from weights that "
            "can be trained. Pass one that was built on the dense base (`value_model` for PPO, `reward_model` for "
            "PRIME)."
        )
    # A prompt stands before the base; the other kinds are modules inside it.
    copied: Any = copy.deepcopy(model.base_model)
    if model.active_peft_config.is_adaption_prompt:
        copied.disable_adapter_layers()
        copied = copied.model
    elif not model.active_peft_config.is_prompt_learning:
        copied = copied.unload()
    # TRL's, which would compute with the weights of `model`.
    vars(copied).pop("forward", None)
    base: PreTrainedModel = copied.requires_grad_(True)
    return base
