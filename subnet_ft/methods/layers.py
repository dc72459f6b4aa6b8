"""The decoder layers of a model and its head, found by its structure: no family is known by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from subnet_ft.checkpoints.models import kind_of
from subnet_ft.errors import MethodError

if TYPE_CHECKING:
    import torch


def head_names(model: torch.nn.Module) -> list[str]:
    """Return the parameters of a reward model's head: those outside the decoder. A language model has none.

    Args:
        model: A model of transformers; on the meta device, too.
    """
    if kind_of(model) == "language_model":
        return []
    untyped: Any = model
    return [name for name, _ in model.named_parameters() if not name.startswith(f"{untyped.base_model_prefix}.")]


def decoder_layers(model: torch.nn.Module) -> tuple[str, list[torch.nn.Module]]:
    """Return the name of a model's layer stack and its layers in order.

    The stack is the `ModuleList` of `config.num_hidden_layers` modules that lies in no other one; of several, the one
    with the most weights.

    Args:
        model: A model of transformers; on the meta device, too.

    Raises:
        MethodError: There is none.
    """
    import torch

    untyped: Any = model
    number = untyped.config.get_text_config().num_hidden_layers
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    found = {
        name: stack
        for name, stack in lists.items()
        if len(stack) == number and not any(name.startswith(f"{other}.") for other in lists)
    }
    if not found:
        raise MethodError(
            f"`{type(model).__name__}` has no list of {number} decoder layers (`config.num_hidden_layers`), so that "
            "nobody can say which its last ones are. Choose a method that goes by matrices, such as `lora`."
        )
    name = max(found, key=lambda name: sum(parameter.numel() for parameter in found[name].parameters()))
    return name, list(found[name])
