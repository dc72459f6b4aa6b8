"""Masks that follow from a model's structure alone: its last layers, its biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from subnet_ft.checkpoints import Checkpoint
from subnet_ft.errors import MethodError
from subnet_ft.masks import Provenance, SubnetMask, TensorMask, record_base
from subnet_ft.methods.layers import decoder_layers, head_names
from subnet_ft.recipe.methods import METHODS


@dataclass(frozen=True)
class LastLayersConfig:
    """Training the last decoder layers, whole."""

    num_layers: int = 2
    """How many, counted from the end."""

    final_norm_and_head: bool = False
    """Train what comes after the layers, too: the final norm, and the output embedding unless it is tied."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"`num_layers` must be >= 1, got {self.num_layers}")


@dataclass(frozen=True)
class BitFitConfig:
    """Training the bias terms only, and the head of a reward model (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    terms: Literal["bias", "bias_and_norm"] = "bias"
    """`bias`: every parameter that is a bias. `bias_and_norm`: the weights of norms, too; most models of today have no
    bias."""


def method_mask(
    name: str, checkpoint: Checkpoint, config: Mapping[str, Any] | None = None, *, dtype: str | None = None
) -> SubnetMask:
    """Build the mask of a method that trains a part of the model's own weights.

    Args:
        name: `last_layers` or `bitfit`.
        checkpoint: The base.
        config: Fields of the method's config.
        dtype: The dtype in which the weights are trained, where they are stored in another one.

    Raises:
        MethodError: The model has too few layers, or nothing that the method would train.
    """
    options = METHODS[name].config_class(**(config or {}))
    names = trained_names(name, checkpoint, config or {})
    full = SubnetMask.full({key: tuple(spec.shape) for key, spec in checkpoint.specs.items()})
    tensors = {
        key: tensor if key in names else TensorMask.build(torch.zeros_like(tensor.bits), tensor.shape)
        for key, tensor in full.tensors.items()
    }
    provenance = Provenance(
        base=record_base(checkpoint, dtype=dtype), compare_dtype=dtype, source={"kind": name, **asdict(options)}
    )
    return SubnetMask(tensors, provenance)


def trained_names(name: str, checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """Return the parameters that such a method trains; arguments and errors are those of `method_mask`."""
    options = METHODS[name].config_class(**config)
    return _last_layers(checkpoint, options) if name == "last_layers" else _bitfit(checkpoint, options)


def _last_layers(checkpoint: Checkpoint, config: LastLayersConfig) -> list[str]:
    stack, layers = decoder_layers(checkpoint.empty_model())
    if config.num_layers > len(layers):
        raise MethodError(
            f"`{checkpoint.name}` has {len(layers)} decoder layers, and `last_layers` asks for {config.num_layers}. "
            f"Set `methods.last_layers.config.num_layers` to at most {len(layers)}."
        )
    prefixes = tuple(f"{stack}.{index}." for index in range(len(layers) - config.num_layers, len(layers)))
    names = [name for name in checkpoint.specs if name.startswith(prefixes)]
    if config.final_norm_and_head:
        names += _after_layers(checkpoint, stack)
    return names


def _after_layers(checkpoint: Checkpoint, stack: str) -> list[str]:
    """Return the parameters that `named_parameters` gives after those of the layers."""
    names = list(checkpoint.specs)
    last = max(index for index, name in enumerate(names) if name.startswith(f"{stack}."))
    return names[last + 1 :]


def _bitfit(checkpoint: Checkpoint, config: BitFitConfig) -> list[str]:
    # The head of a reward model is new and trained in any case, as the paper's task heads are.
    head = head_names(checkpoint.empty_model())
    kinds = {name: name.rpartition(".")[2] for name in checkpoint.specs if name not in head}
    # Layers that keep their weights in one module, such as stacked experts, name each bias after its weight.
    biases = [name for name, kind in kinds.items() if kind == "bias" or kind.endswith("_bias")]
    norms = [name for name, kind in kinds.items() if kind == "weight" and len(checkpoint.specs[name].shape) == 1]
    chosen = biases if config.terms == "bias" else biases + norms
    if chosen:
        return chosen + head
    if norms:
        raise MethodError(
            f"`{checkpoint.name}` has no bias, so `bitfit` would train nothing. Its norms have {len(norms)} weight "
            "vectors: set `methods.bitfit.config.terms: bias_and_norm` to train those."
        )
    raise MethodError(f"`{checkpoint.name}` has neither a bias nor a norm with weights. Choose another method.")
