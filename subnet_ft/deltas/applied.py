"""`applied`: inside the block, a model computes with the values of a delta."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch

from subnet_ft.checkpoints.listing import listing
from subnet_ft.deltas.delta import Delta
from subnet_ft.deltas.swap import WeightSwap, reshard
from subnet_ft.errors import DeltaMismatchError
from subnet_ft.masks import ModelRecord, by_canonical_name, format_fingerprint
from subnet_ft.optim.fingerprints import fingerprints

ModelT = TypeVar("ModelT", bound=torch.nn.Module)
Parameters = Mapping[str, torch.nn.Parameter]

# What PEFT adds to the names of a model's own weights.
_PEFT_MODEL, _PEFT_LAYER = "base_model.model.", ".base_layer."


@contextlib.contextmanager
def applied(model: ModelT, delta: Delta, *, check_base: bool = True) -> Iterator[ModelT]:
    """Inside the block, `model` computes with the values of `delta`; afterwards every bit of it is what it was.

    There is no second model: values and weights change places, and the delta itself stays as it is. Only one delta is
    in a model at a time. Weights may be read inside, saved for instance, but not written: neither trained nor loaded,
    cast or moved. A graph from before the block can be gone back through after it, not inside it.

    Under an adapter of PEFT that is not merged, the delta is that of the model under it. Where FSDP2 shards the model,
    all processes enter and leave together.

    Args:
        model: The base of the delta, in memory. In-out.
        delta: Its values, in the dtype of the weights.
        check_base: Compare the fingerprints of the tensors that the delta changes first: one pass over them.

    Yields:
        The model.

    Raises:
        DeltaMismatchError: The model is not the base of the delta, or cannot hold it.
        SwapError: Something else is in the model already; on leaving, if somebody wrote to the weights inside.

    Example:
        `with applied(model, delta): answers = model.generate(**prompts)`
    """
    reshard(model)
    parameters = parameters_of(model, delta)
    swap = swap_of(model, delta, parameters, name=f"the delta of `{delta.base.name}`")
    if check_base:
        changed = {name for name, tensor in delta.tensors.items() if tensor.count}
        check_weights(parameters, delta.base, changed)
    with swap.inside():
        yield model


def parameters_of(model: torch.nn.Module, delta: Delta) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a model by the names of a delta, in the delta's order.

    Raises:
        DeltaMismatchError: Names, shapes or dtypes differ, or the weights are not there or not contiguous.
        MaskError: Two parameters have one name.
    """
    found = by_canonical_name(model.named_parameters())
    if any(name.startswith(_PEFT_MODEL) for name in found):
        under = {name.removeprefix(_PEFT_MODEL).replace(_PEFT_LAYER, "."): p for name, p in found.items()}
        found = {name: under[name] for name in delta.tensors if name in under}
    missing = [name for name in delta.tensors if name not in found]
    extra = [name for name in found if name not in delta.tensors]
    if missing or extra:
        raise DeltaMismatchError(
            f"The delta and the model have different parameters: {listing(missing)} only in the delta, "
            f"{listing(extra)} only in the model. The delta was made for `{delta.base.name}`. Take a model that was "
            "loaded from it; one that is flattened (FSDP1, DeepSpeed) or quantized holds other parameters."
        )
    for name, tensor in delta.tensors.items():
        _check_parameter(name, found[name], tensor.shape, delta.base)
    return {name: found[name] for name in delta.tensors}


def swap_of(model: torch.nn.Module, delta: Delta, parameters: Parameters, *, name: str) -> WeightSwap:
    """Return the values of a delta, ready to change places with those of the model."""
    return WeightSwap(model, parameters, delta.mask, lambda tensor: delta.tensors[tensor].values, name=name)


def check_weights(parameters: Parameters, base: ModelRecord, names: Iterable[str]) -> None:
    """Compare weights with a base, bit by bit; where processes hold parts of them, all of them call it.

    Raises:
        DeltaMismatchError: One is not the base's.
    """
    chosen = set(names)
    for name, sums in fingerprints({name: p for name, p in parameters.items() if name in chosen}).items():
        found = format_fingerprint(sums)
        if found != base.fingerprints[name]:
            raise DeltaMismatchError(
                f"The weights of `{name}` are not those of `{base.name}`, which the delta was made for: fingerprint "
                f"{found}, expected {base.fingerprints[name]}. Load that base, and merge or train nothing before."
            )


def _check_parameter(name: str, parameter: torch.nn.Parameter, shape: tuple[int, ...], base: ModelRecord) -> None:
    dtype = str(parameter.dtype).removeprefix("torch.")
    if tuple(parameter.shape) != shape or dtype != base.dtypes[name]:
        raise DeltaMismatchError(
            f"`{name}` is {dtype} of shape {tuple(parameter.shape)} in the model and {base.dtypes[name]} of shape "
            f"{shape} in `{base.name}`, which the delta was made for. Load the base in {base.dtypes[name]}, without "
            "quantization."
        )
    if parameter.is_meta:
        raise DeltaMismatchError(
            f"`{name}` is on the meta device: the model has shapes and no weights yet. Load the base into it first."
        )
    if not parameter.is_contiguous():
        raise DeltaMismatchError(f"`{name}` is not contiguous in the model; call `.contiguous()` on its data first.")
