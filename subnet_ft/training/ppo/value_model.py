"""`ValueModel`: a language model's backbone with a head that predicts a number at every token."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model

from subnet_ft.errors import TrainerError
from subnet_ft.masks import SubnetMask
from subnet_ft.training.base_of import base_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

HEAD = "score"


class ValueModel(torch.nn.Module):
    """The backbone of a causal language model, copied, and one linear head in float32 that starts at zero.

    The backbone keeps the name that it has in the language model, so its weights keep theirs: a mask of the policy says
    what it says of the value model, too (see `value_mask_like`). The head is `score`, as transformers calls it.

    Args:
        model: Causal language model to start from, or one with an adapter, of which only the base counts. It is not
            changed, and shares nothing with the value model.

    Raises:
        TrainerError: The model has no backbone apart from its head, or it is quantized under its adapter.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        given: Any = model
        whole: Any = base_of(given) if is_peft_model(given) else given
        backbone = whole.base_model
        if backbone is whole:
            raise TrainerError(
                f"`{type(whole).__name__}` names no backbone (`base_model_prefix`) on which a value head could stand. "
                "Pass `value_model=ValueModel(...)`, built on another model with the same tokenizer."
            )
        self._prefix = whole.base_model_prefix
        copied = copy.deepcopy(backbone) if whole is given else backbone
        setattr(self, self._prefix, copied.requires_grad_(True))
        width = backbone.config.get_text_config().hidden_size
        device = next(backbone.parameters()).device
        head = torch.nn.Linear(width, 1, dtype=torch.float32, device=device)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        self.score = head
        self.is_checkpointing = False
        self.eval()

    @property
    def backbone(self) -> PreTrainedModel:
        """The language model without its head."""
        backbone: PreTrainedModel = getattr(self, self._prefix)
        return backbone

    def checkpoint_activations(self) -> None:
        """Compute the layers again in the backward pass instead of keeping what they computed."""
        enable: Any = getattr(self.backbone, "activation_checkpointing_enable", None)
        enable = enable or self.backbone.gradient_checkpointing_enable  # transformers before 5.20
        enable({"use_reentrant": False})  # the other form needs embeddings that train
        self.is_checkpointing = True

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Predict, for each of the last `num_tokens` tokens, what is still to come, from what stands before it.

        Args:
            input_ids: (B, L) prompts, padded on the left, and completions. In.
            attention_mask: (B, L). In.
            num_tokens: T, the length of the completions.

        Returns:
            (B, T) float32.
        """
        # Layers are checkpointed in training mode only, which is also what switches dropout on.
        self.train(self.is_checkpointing and torch.is_grad_enabled())
        outputs = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden = outputs.last_hidden_state[:, -num_tokens - 1 : -1]
        # A product with float32, and not one of matrices, which autocast would round to bfloat16.
        values: torch.Tensor = (hidden * self.score.weight[0]).sum(-1) + self.score.bias
        return values


def value_mask_like(subnet_mask: SubnetMask, value_model: ValueModel) -> SubnetMask:
    """Return the mask that trains the value model where a mask of the policy trains the policy, and its whole head.

    Args:
        subnet_mask: The policy's.
        value_model: Built on the same architecture.

    Raises:
        TrainerError: The mask names none of a weight of the backbone.
    """
    tensors = {}
    for name, parameter in value_model.named_parameters():
        shape = tuple(parameter.shape)
        if name.startswith(f"{HEAD}."):
            tensors[name] = SubnetMask.full({name: shape}).tensors[name]
        elif name in subnet_mask.tensors:
            tensors[name] = subnet_mask.tensors[name]
        else:
            raise TrainerError(
                f"The mask has no `{name}`, which the value model has with shape {shape}: they are of two "
                "architectures. Pass a mask that was made for the value model, or none to train all of it."
            )
    return SubnetMask(tensors)
