"""Adapters on a base whose linear layers are held in 8 or 4 bits: what PEFT's layers need to compute there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from subnet_ft.checkpoints.quantized import quantized_layers

if TYPE_CHECKING:
    import torch


def compute_on_quantized(adapted: torch.nn.Module) -> None:
    """Let every adapter compute on quantized layers, whatever their dtype and as often as it is called.

    Three layers of PEFT (0.21) cannot. IA3's returns float32 where its input is narrower, and attention then meets two
    dtypes. SHiRA's adds to the weights of an 8-bit layer in float32 and multiplies narrower inputs by the sum. DoRA's
    reads the norms of weights at every call, by a move of the 8-bit weights on a CPU that loses their scales.

    Args:
        adapted: A model with an adapter, its base quantized. In-out: hooks are added, weights stay.
    """
    from peft.tuners.ia3.layer import IA3Layer
    from peft.tuners.shira.layer import ShiraLayer

    for module in adapted.modules():
        if isinstance(module, IA3Layer):
            module.register_forward_hook(_in_the_dtype_of_the_input)
        elif isinstance(module, ShiraLayer) and module.quantization_backend is not None:
            # Then it adds what its weights give to what the layer gives, which computes as without an adapter.
            module.quantization_backend.supports_merge = False
    for layer in quantized_layers(adapted).values():
        if hasattr(layer, "state"):  # of 8 bits
            layer.register_forward_pre_hook(_give_scales_back)


def _in_the_dtype_of_the_input(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(inputs[0].dtype)


def _give_scales_back(layer: Any, inputs: Any) -> None:
    weight = layer.weight
    if weight.CB is not None and weight.SCB is None:
        weight.SCB = layer.state.SCB
