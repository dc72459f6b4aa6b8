"""A reference model whose linear layers are held in 8 or 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from subnet_ft.checkpoints.models import load_model
from subnet_ft.checkpoints.quantized import quantized_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from subnet_ft.recipe import Recipe


def hold_quantized(reference: PreTrainedModel, base: Path, recipe: Recipe) -> None:
    """Replace the linear layers of a reference model by the quantized ones of the base, as `load_model` gives them.

    A trainer makes its reference model by itself and changes how it computes (TRL's fused head); that stays. Dense
    layers are gone afterwards, before anything is trained, so they cost memory only while the trainer is built.

    Args:
        reference: Of the base's weights. In-out.
        base: Folder of the base checkpoint.
        recipe: Its `reference.quantization` says how.

    Raises:
        CheckpointError: This machine cannot run quantized layers, or the base has none to quantize.
        MissingDependencyError: bitsandbytes is not installed.
    """
    spec = recipe.model
    held, _ = load_model(
        base,
        dtype=spec.dtype,
        attn_implementation=spec.attn_implementation,
        quantization=recipe.reference.quantization,
    )
    for name, layer in quantized_layers(held).items():
        parent, _, child = name.rpartition(".")
        reference.get_submodule(parent).register_module(child, layer)
