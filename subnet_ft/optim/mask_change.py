"""Another mask in the middle of training: which one may follow, and what is kept."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from subnet_ft.errors import GradientError, MaskMismatchError, OptimizerError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim.binding import Binding
from subnet_ft.optim.parameters import check_base_weights, check_parameters
from subnet_ft.optim.processes import num_processes
from subnet_ft.optim.shards import is_sharded

if TYPE_CHECKING:
    from subnet_ft.optim.base import MaskedBase


def set_mask(optimizer: MaskedBase, mask: SubnetMask) -> None:
    """Do what `MaskedBase.set_mask` says."""
    binding = optimizer._binding
    parameters = {name: parameter for parameter, name in binding.names.items()}
    check_parameters(parameters, mask, check_base=False)
    _check_successor(binding.mask, mask, parameters, untouched=binding.untouched, compact_grads=optimizer.compact_grads)
    if optimizer._gradients.is_pending:
        raise GradientError("Gradients wait for their step under the old mask. Change it after `step()`.")
    optimizer.audit()
    old = {p: binding.bit_mask(p) for p in optimizer._trained() if optimizer.state.get(p)}
    new = {p: binding.under(mask, p) for p in old if mask.tensors[binding.names[p]].count}
    remapped = {p: optimizer._remapped_entries(p, optimizer.state[p], old[p], new[p]) for p in new}
    # From here on nothing can be refused.
    optimizer._change_mask(mask, remapped)
    optimizer._frozen.take()


def start_over(optimizer: MaskedBase, mask: SubnetMask, earlier: Sequence[SubnetMask] | None) -> None:
    """Do what `MaskedBase.start_over` says."""
    binding = optimizer._binding
    check_parameters({name: parameter for parameter, name in binding.names.items()}, mask, check_base=False)
    optimizer._forget_gradients()
    optimizer._change_mask(mask, {})
    binding.untouched = set() if earlier is None else binding.untouched_by([*earlier, mask])
    optimizer._frozen.taken = None


def rebind(optimizer: MaskedBase, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Do what `MaskedBase.rebind` says."""
    known = {name: tuple(parameter.shape) for parameter, name in optimizer._binding.names.items()}
    found = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if found != known:
        other = next(name for name in {**known, **found} if known.get(name) != found.get(name))
        raise OptimizerError(
            f"`{other}` was of shape {known.get(other, 'none')} when the optimizer was built and is of shape "
            f"{found.get(other, 'none')} now. Build a new optimizer on the other model."
        )
    if any(optimizer.state.values()):
        raise OptimizerError(
            "The optimizer has taken steps, and its state belongs to the parameters that it was built on. Shard the "
            "model before training, or save the state and load it into a new optimizer."
        )
    check_parameters(parameters, optimizer.mask, check_base=False)
    binding = Binding(parameters, optimizer.mask)
    optimizer._take_parameters(binding)


def _check_successor(
    old: SubnetMask,
    new: SubnetMask,
    parameters: Mapping[str, torch.nn.Parameter],
    *,
    untouched: Container[str],
    compact_grads: bool,
) -> None:
    """Check that a mask may follow another on a model in training; names and shapes were checked before.

    Weights that were trained are not those of the base any more, so the base is compared where none were, and by what
    the two masks record.

    Raises:
        MaskMismatchError: The new mask was made for another base.
        GradientError: A tensor starts to train that DDP took for frozen.
    """
    before, after = old.provenance.base, new.provenance.base
    for name, dtype in ({} if after is None else after.dtypes).items():
        found = str(parameters[name].dtype).removeprefix("torch.") if name in parameters else dtype
        if found != dtype:
            raise MaskMismatchError(f"`{name}` is {found} but the new mask was compared in {dtype}.")
    if before is not None and after is not None:
        for name, fingerprint in before.fingerprints.items():
            if after.fingerprints.get(name, fingerprint) != fingerprint:
                raise MaskMismatchError(
                    f"The new mask was made for another base: `{name}` has fingerprint {fingerprint} in the base of "
                    f"the old mask ({before.name}) and {after.fingerprints[name]} in that of the new one "
                    f"({after.name}). Take masks of one base."
                )
    check_base_weights({name: p for name, p in parameters.items() if name in untouched}, new)
    # Under DDP, a tensor that has left a mask keeps its gradient, and may come back.
    entering = [name for name, p in parameters.items() if new.tensors[name].count and not p.requires_grad]
    if entering and not compact_grads and num_processes() > 1 and not is_sharded(parameters[entering[0]]):
        raise GradientError(
            f"`{entering[0]}` had no trainable weight so far, and DDP decides when it wraps a model which gradients "
            "it reduces, so the processes would part ways. Start with a mask that trains something in it."
        )
