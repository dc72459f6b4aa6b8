"""What stands beside the policy: reference models, also those held in 8 or 4 bits, and the bytes of it all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subnet_ft.checkpoints.models import load_model
from subnet_ft.checkpoints.quantized import quantized_layers, weight_bytes
from subnet_ft.training.free_reference import FreeReference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from subnet_ft.recipe import Recipe
    from subnet_ft.recipe.algorithms import Algorithm


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


def references(trainer: Any, algorithm: Algorithm) -> list[Any]:
    """Return the reference models that a trainer holds."""
    # What computes with the policy's own base, adapter off, holds no weights.
    models = [getattr(trainer, name) for name in algorithm.references]
    return [model for model in models if isinstance(model, torch.nn.Module)]


def memory_beside(trainer: Any, algorithm: Algorithm) -> dict[str, int]:
    """Count the bytes of reference models, of a teacher, and of what is trained beside the policy."""
    held = [
        model.nbytes if isinstance(model, FreeReference) else weight_bytes(model)
        for model in references(trainer, algorithm)
    ]
    memory = {"reference_model": sum(held)}
    teacher = getattr(trainer, "teacher_model", None)
    if teacher is not None:
        memory["teacher_model"] = sum(p.nbytes for p in teacher.parameters())
    for name, part in getattr(trainer, "checkpoint_extras", dict)().items():
        memory[name] = (
            sum(p.nbytes for p in part.parameters()) if hasattr(part, "parameters") else sum(part.memory().values())
        )
    return {name: size for name, size in memory.items() if size}
