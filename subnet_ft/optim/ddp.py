"""Training under DDP with compact gradients: DDP keeps one small tensor, and the optimizer reduces the rest."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
import torch.distributed as dist

from subnet_ft.errors import FrozenWeightError, GradientError
from subnet_ft.masks import by_canonical_name, format_fingerprint
from subnet_ft.optim.fingerprints import fingerprints
from subnet_ft.optim.gradients import CompactGradients
from subnet_ft.optim.owners import owners_of
from subnet_ft.optim.processes import communication_device, num_processes
from subnet_ft.optim.reduction import Replica, mark, unmark
from subnet_ft.optim.shards import is_sharded, replica_groups

_COMPILED = "_orig_mod."
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def prepare_ddp(
    model: torch.nn.Module, *, kept: str | None = None, process_group: dist.ProcessGroup | None = None
) -> str:
    """Make DDP leave the gradients of a model to its masked optimizer; call it before DDP wraps `model` itself.

    DDP reduces dense gradients, of all N weights. A masked optimizer with compact gradients reduces the K values of the
    mask instead, in one all-reduce per step, whichever comes first, optimizer or DDP. DDP insists on a tensor of its
    own that gets a gradient in every step: it keeps one small one. Weights of the processes are made those of the first
    one, as DDP does. Buffers stay with DDP. The optimizer's `release()` undoes it.

    Args:
        model: What DDP will wrap. Its processes call this together.
        kept: Name of the tensor that DDP keeps; it must get a gradient in every backward pass. `None`: the last vector
            of the model, which in transformers is the final norm.
        process_group: What DDP will get as `process_group`.

    Returns:
        The name of the tensor that DDP keeps.

    Raises:
        GradientError: Parameters are sharded, or `kept` is none of them.
    """
    parameters = by_canonical_name(model.named_parameters())
    sharded = [name for name, parameter in parameters.items() if is_sharded(parameter)]
    if sharded:
        raise GradientError(
            f"`{sharded[0]}` is sharded, and DDP replicates. Under `fully_shard` build the optimizer without "
            "`prepare_ddp`."
        )
    unmark(parameters.values())  # another `kept` than before would be ignored as well
    kept = _small_tensor(parameters) if kept is None else kept
    if kept not in parameters:
        raise GradientError(f"The model has no parameter `{kept}` for DDP to keep. Name one of its norms.")
    ignored = {name for name, p in model.named_parameters(remove_duplicate=False) if p is not parameters[kept]}
    # The reducer writes a parameter of the model itself with a dot; a compiled model has a prefix.
    spellings = [*ignored, *(f".{name}" for name in ignored if "." not in name)]
    spellings += [_COMPILED + name for name in ignored]
    earlier = sorted(getattr(model, _IGNORED, ()))
    # What DDP's own `_set_params_and_buffers_to_ignore_for_model` sets, which knows no tied and no compiled names.
    setattr(model, _IGNORED, sorted({*earlier, *spellings}))
    reference = weakref.ref(model)

    def forget() -> None:
        found = reference()
        if found is not None:
            setattr(found, _IGNORED, earlier)

    for name, parameter in parameters.items():
        parameter._ddp_ignored = name != kept  # type: ignore[attr-defined]
        mark(parameter, Replica(process_group, is_kept=name == kept, forget=forget))
    parameters[kept].requires_grad_(True)
    if num_processes(process_group) > 1:
        _broadcast(parameters, process_group)
    for owner in owners_of(parameters.values()):
        if isinstance(owner, CompactGradients):
            owner.share()
    return kept


def check_replicas(parameters: Mapping[str, torch.nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Compare the weights of processes that hold replicas by their fingerprints; all processes call it together.

    Of sharded parameters those parts are compared that a dimension of their mesh replicates.

    Raises:
        FrozenWeightError: A tensor differs between processes.
    """
    sharded = [parameter for parameter in parameters.values() if is_sharded(parameter)]
    groups: list[tuple[dist.ProcessGroup | None, torch.device]] = []
    if sharded:  # replicated by one dimension of a mesh, if at all
        groups += replica_groups(sharded)
    elif num_processes(group) > 1:
        groups.append((group, communication_device(group)))
    differing = [name for one, device in groups for name in _differing(parameters, one, device)]
    if differing:
        raise FrozenWeightError(
            f"The processes have parted ways: `{differing[0]}` and {len(differing) - 1} other tensors have other bits "
            f"in process {dist.get_rank(group)} or elsewhere than in the first. Resume from the last checkpoint, and "
            "look for code that writes weights in one process only."
        )


def _small_tensor(parameters: Mapping[str, torch.nn.Parameter]) -> str:
    """Return the name of the last vector, biases excepted, else of the smallest tensor."""
    vectors = [name for name, p in parameters.items() if p.dim() == 1 and not name.endswith("bias")]
    return vectors[-1] if vectors else min(parameters, key=lambda name: parameters[name].numel())


def _broadcast(parameters: Mapping[str, torch.nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Make the weights of all processes those of the first; what is the same already is not sent."""
    device = communication_device(group)
    for name in _differing(parameters, group, device):
        weights = parameters[name].detach()
        sent = weights.to(device)
        dist.broadcast(sent, group=group, group_src=0)
        weights.copy_(sent)


def _differing(
    parameters: Mapping[str, torch.nn.Parameter], group: dist.ProcessGroup | None, device: torch.device
) -> list[str]:
    """Return the names of the tensors that some process has with other bits than the first."""
    digests = [int(format_fingerprint(sums)[:15], 16) for sums in fingerprints(parameters).values()]
    own = torch.tensor(digests, device=device)
    first = own.clone()
    dist.broadcast(first, group=group, group_src=0)
    differs = (own != first).to(torch.int32)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=group)
    return [name for name, differing in zip(parameters, differs.tolist(), strict=True) if differing]
