"""Which tensors a method holds in memory, and how many weights of each it trains."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from subnet_ft.errors import MethodError
from subnet_ft.masks import SubnetMask
from subnet_ft.methods.adapters import adapter_config, refusals_of, wrap
from subnet_ft.plan.shapes import ModelShapes
from subnet_ft.recipe.methods import METHODS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PlannedTensor:
    """A parameter in memory.

    Args:
        name: Its name.
        shape: Its shape.
        dtype: Of its weights.
        count: K, how many of them are trained.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    count: int

    @property
    def num_elements(self) -> int:
        """N, how many there are."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.num_elements * self.dtype.itemsize

    def shard(self, world: int) -> PlannedTensor:
        """Return what the first of `world` ranks holds of it: the largest part, as `fully_shard` cuts rows.

        Its trained weights are taken to lie evenly over the rows.
        """
        if world == 1 or not self.shape:
            return self
        rows = -(-self.shape[0] // world)
        part = PlannedTensor(self.name, (rows, *self.shape[1:]), self.dtype, 0)
        count = -(-self.count * part.num_elements // max(self.num_elements, 1))
        return PlannedTensor(part.name, part.shape, part.dtype, count)


@dataclass(frozen=True, eq=False)
class Trained:
    """A model under a method.

    Args:
        method: Its name.
        tensors: Every parameter in memory.
        build: Builds the model on the meta device, with that method's weights, trained ones marked by `requires_grad`.
    """

    method: str
    tensors: tuple[PlannedTensor, ...]
    build: Callable[[], torch.nn.Module]

    @property
    def num_parameters(self) -> int:
        """Weights in memory."""
        return sum(tensor.num_elements for tensor in self.tensors)

    @property
    def num_trainable(self) -> int:
        """Weights that train."""
        return sum(tensor.count for tensor in self.tensors)

    def sharded(self, world: int) -> tuple[PlannedTensor, ...]:
        """Return what one rank of `world` holds."""
        return tuple(tensor.shard(world) for tensor in self.tensors)


def masked(shapes: ModelShapes, method: str, counts: Mapping[str, int]) -> Trained:
    """Return a model of which a mask is trained.

    Args:
        shapes: The model.
        method: `full` or `subnet`.
        counts: Parameter name to how many of its weights are trained.
    """
    tensors = tuple(PlannedTensor(name, shape, shapes.dtype, counts[name]) for name, shape in shapes.parameters.items())

    def build() -> torch.nn.Module:
        model = shapes.build()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(counts[name] > 0)
        return model

    return Trained(method, tensors, build)


@functools.lru_cache(maxsize=32)
def fully(shapes: ModelShapes) -> Trained:
    """Return a model of which everything is trained."""
    return masked(shapes, "full", {name: math.prod(shape) for name, shape in shapes.parameters.items()})


@functools.lru_cache(maxsize=32)
def of_density(shapes: ModelShapes, density: float) -> Trained:
    """Return a model of which the same share of every tensor is trained, rounded."""
    counts = {name: round(density * math.prod(shape)) for name, shape in shapes.parameters.items()}
    return masked(shapes, "subnet", counts)


def of_mask(shapes: ModelShapes, mask: SubnetMask) -> Trained:
    """Return a model of which a mask is trained.

    Raises:
        MaskMismatchError: The mask belongs to another model.
    """
    mask.check_shapes(shapes.parameters)
    return masked(shapes, "subnet", {name: tensor.count for name, tensor in mask.tensors.items()})


@functools.lru_cache(maxsize=32)
def with_value_head(trained: Trained, shapes: ModelShapes) -> Trained:
    """Return PPO's value model on a model: without an output embedding of its own, with a linear head in float32."""
    import torch

    backbone = [tensor for tensor in trained.tensors if tensor.name != shapes.head or shapes.is_tied]
    head = [
        PlannedTensor("score.weight", (1, shapes.width), torch.float32, shapes.width),
        PlannedTensor("score.bias", (1,), torch.float32, 1),
    ]
    return Trained(trained.method, (*backbone, *head), trained.build)


def adapted(shapes: ModelShapes, method: str, config: Mapping[str, Any]) -> Trained:
    """Return a model with an adapter.

    Args:
        shapes: The base.
        method: A method that trains an adapter.
        config: Fields of the method's config that a recipe sets.

    Raises:
        MethodError: PEFT refuses the config, or the method starts from more than a config.
    """
    return _adapted(shapes, method, tuple(sorted((key, repr(value)) for key, value in config.items())), _Held(config))


class _Held:
    """A recipe's settings beside the key that they are cached by."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=32)
def _adapted(shapes: ModelShapes, method: str, key: tuple[tuple[str, str], ...], held: _Held) -> Trained:
    import torch

    known = METHODS[method]

    def build() -> torch.nn.Module:
        model = shapes.build()
        with refusals_of(known, type(model).__name__):
            built: Any = adapter_config(known, held.config, base=shapes.name, kind=shapes.kind)
            if method == "eva":
                # Where its rows start from is no matter of their size.
                built.init_lora_weights = True
                built.eva_config = None
            with torch.device("meta"):
                return wrap(model, built)

    model = build()
    tensors = tuple(
        PlannedTensor(name, tuple(p.shape), p.dtype, p.numel() if p.requires_grad else 0)
        for name, p in model.named_parameters()
    )
    if not any(tensor.count for tensor in tensors):
        raise MethodError(f"`{method}` adds no weights to `{shapes.name}`. Change `methods.{method}.config`.")
    return Trained(method, tensors, build)
