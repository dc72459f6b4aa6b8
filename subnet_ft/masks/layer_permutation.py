"""The layer-permuted control: every decoder layer gets the mask of another one."""

from __future__ import annotations

import numpy as np

from subnet_ft.errors import MaskError
from subnet_ft.masks.density import layer_and_kind
from subnet_ft.masks.draws import drawn_like
from subnet_ft.masks.mask import SubnetMask, TensorMask
from subnet_ft.masks.selection import generator_of


def layer_permuted(mask: SubnetMask, seed: int) -> dict[str, TensorMask]:
    """Give every tensor the bits that a tensor of its kind has in another layer.

    Kinds that the same layers have move together, so that a layer's mask stays whole. No layer keeps its own. What has
    no other layer to come from, outside the layers or alone of its kind, is drawn uniformly with its own count.

    Raises:
        MaskError: Tensors of one kind have different shapes.
    """
    kinds: dict[tuple[str, str], dict[str, str]] = {}  # stack and kind: layer -> name
    for name in mask.tensors:
        layer, kind = layer_and_kind(name)
        if layer != "other":
            stack = name.removesuffix(kind).removesuffix(f"{layer}.")
            kinds.setdefault((stack, kind), {})[layer] = name
    sources: dict[str, str] = {}
    for (stack, kind), by_layer in kinds.items():
        _check_shapes(mask, stack + kind, by_layer)
        layers = list(by_layer)
        if len(layers) > 1:
            for layer, other in zip(layers, _without_fixed_points(stack, layers, seed), strict=True):
                sources[by_layer[layer]] = by_layer[other]
    return {
        name: mask.tensors[sources[name]] if name in sources else drawn_like(tensor, f"permuted {name}", seed)
        for name, tensor in mask.tensors.items()
    }


def _without_fixed_points(stack: str, layers: list[str], seed: int) -> list[str]:
    """Permute two or more layers so that none stays, every such permutation as likely as any other."""
    rng = generator_of(seed, f"{stack}{','.join(layers)}")
    while True:  # e tries on average
        order = rng.permutation(len(layers))
        if not (order == np.arange(len(layers))).any():
            return [layers[index] for index in order]


def _check_shapes(mask: SubnetMask, kind: str, by_layer: dict[str, str]) -> None:
    first, *others = by_layer.values()
    for name in others:
        if mask.tensors[name].shape != mask.tensors[first].shape:
            raise MaskError(
                f"`{first}` has shape {mask.tensors[first].shape} and `{name}` has shape {mask.tensors[name].shape}, "
                f"so their masks cannot change places. A layer-permuted control needs layers of one shape; use another "
                "control, such as `magnitude_matched`."
            )
