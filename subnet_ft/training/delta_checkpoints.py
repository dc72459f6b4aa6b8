"""Trainer checkpoints that hold a delta of the base instead of the dense weights (`save_only_delta`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

import subnet_kernels
from subnet_ft.checkpoints.listing import listing
from subnet_ft.deltas import DeltaFile, masked_delta
from subnet_ft.deltas.header import DTYPES
from subnet_ft.deltas.writing import save_delta
from subnet_ft.errors import CheckpointError, OptimizerStateError, TrainerError
from subnet_ft.masks import ModelRecord, Provenance, SubnetMask, by_canonical_name, format_fingerprint
from subnet_ft.optim.shards import is_sharded
from subnet_kernels import BitMask

if TYPE_CHECKING:
    from transformers import Trainer

DELTA = "model.delta.safetensors"
"""File of a checkpoint that takes the place of its dense weights."""


def holds_delta(checkpoint: Path) -> bool:
    """Whether a checkpoint holds a delta instead of dense weights."""
    return (checkpoint / DELTA).is_file()


_INSTEAD = "Leave `save_only_delta` off; the checkpoints are dense then."


def check_only_delta(trainer: Trainer) -> None:
    """Refuse a trainer whose checkpoints need more than a delta of its parameters.

    Raises:
        TrainerError: Its model is sharded by FSDP2, has adapters, or keeps state that a delta cannot hold; or it pushes
            weights out of its checkpoints.
    """
    from accelerate.utils import is_peft_model

    args = trainer.args
    if trainer.is_fsdp_enabled:
        raise TrainerError(
            "`save_only_delta=True` reads the whole weights in one process, and FSDP2 shards them. Leave it off, or "
            "train under DDP; `subnet-ft delta export` makes a delta of any dense checkpoint."
        )
    if is_peft_model(trainer.model):
        raise TrainerError(f"`save_only_delta=True` is of no use to PEFT adapters, whose files are small. {_INSTEAD}")
    if args.push_to_hub and args.hub_strategy == "every_save":
        raise TrainerError(
            "`push_to_hub=True` with `hub_strategy='every_save'` pushes the dense weights of every checkpoint, and "
            "under `save_only_delta=True` there are none. Set `hub_strategy` to `end`, or to `checkpoint`, which "
            "pushes the checkpoint as it is."
        )
    assert trainer.model is not None
    check_held_by_delta(trainer.model)


def check_held_by_delta(model: torch.nn.Module) -> None:
    """Refuse a model that saves more than parameters in dtypes that a delta holds.

    Raises:
        TrainerError: It does; the message names the tensors.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    others = sorted(model.state_dict().keys() - parameters.keys())
    if others:
        raise TrainerError(
            f"A delta holds parameters, and the model saves {len(others)} other tensors: {listing(others)}. {_INSTEAD}"
        )
    odd = sorted(name for name, parameter in parameters.items() if parameter.dtype not in DTYPES.values())
    if odd:
        raise TrainerError(
            f"A delta holds {', '.join(DTYPES)}, and `{odd[0]}` is {parameters[odd[0]].dtype} ({len(odd)} such "
            f"tensors). {_INSTEAD}"
        )


class DeltaCheckpoints:
    """Writes deltas of a model under one mask; made while the model still is the base.

    Args:
        model: The base, in memory.
        mask: What will be trained.
    """

    def __init__(self, model: torch.nn.Module, mask: SubnetMask) -> None:
        parameters = by_canonical_name(model.named_parameters())
        known = mask.provenance.base
        name = known.name if known is not None else getattr(getattr(model, "config", None), "_name_or_path", "")
        dtypes, fingerprints = {}, {}
        self._frozen: dict[str, tuple[int, int]] = {}
        for key, parameter in parameters.items():
            flat, tensor = parameter.detach().reshape(-1), mask.tensors[key]
            bits = BitMask.from_bits(tensor.full_bits(), tensor.num_elements, flat.device)
            dtypes[key] = str(parameter.dtype).removeprefix("torch.")
            fingerprints[key] = format_fingerprint(subnet_kernels.fingerprint(flat))
            self._frozen[key] = subnet_kernels.fingerprint(flat, outside=bits)
        revision = known.revision if known is not None else None
        self.base = ModelRecord(name or "a model in memory", revision, dtypes, fingerprints)
        self._mask = SubnetMask(mask.tensors, Provenance(base=self.base))

    def write(self, model: torch.nn.Module, folder: Path, *, step: int) -> None:
        """Write the delta of the model as it is.

        Raises:
            DeltaMismatchError: A weight outside the mask is no longer the base's; the delta would leave it out.
        """
        source = {"kind": "checkpoint", "step": step}
        parameters = by_canonical_name(model.named_parameters())
        save_delta(masked_delta(parameters.items(), self._mask, frozen=self._frozen, source=source), folder / DELTA)

    def check_base(self, checkpoint: Path) -> None:
        """Check that a checkpoint's delta belongs to the base that later ones will belong to.

        Raises:
            OptimizerStateError: It was made from another base.
        """
        recorded = DeltaFile(checkpoint / DELTA).base.fingerprints
        now = self.base.fingerprints
        other = [name for name in {**now, **recorded} if now.get(name) != recorded.get(name)]
        if other:
            raise OptimizerStateError(
                f"`{checkpoint}` holds a delta of another base: the weights of `{other[0]}` had the fingerprint "
                f"{now.get(other[0])} when this trainer was restricted, that delta needs {recorded.get(other[0])} "
                f"({len(other)} tensors differ). Load the base that the run was started from before `restrict`."
            )


def load_delta(model: torch.nn.Module, checkpoint: Path) -> None:
    """Write the values of a checkpoint's delta to a model that has the base's weights outside of them.

    What comes out is for the caller to compare with the digest in the manifest.

    Raises:
        CheckpointError: The model has other parameters, or FSDP2 shards it.
        DeltaFileError: The file breaks its format.
    """
    delta = DeltaFile(checkpoint / DELTA)
    parameters = by_canonical_name(model.named_parameters())
    if any(is_sharded(parameter) for parameter in parameters.values()):
        raise CheckpointError(
            f"`{checkpoint}` holds a delta, and FSDP2 shards this model. Make the dense checkpoint out of it "
            f"(`subnet-ft delta apply BASE {checkpoint / DELTA} -o FOLDER`), or resume without FSDP2."
        )
    expected = {name: (entry.shape, DTYPES[entry.dtype]) for name, entry in delta.entries.items()}
    found = {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in parameters.items()}
    other = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if other:
        raise CheckpointError(
            f"The delta of `{checkpoint}` belongs to another model: `{other[0]}` is {expected.get(other[0])} there and "
            f"{found.get(other[0])} here ({len(other)} tensors differ)."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if delta.entries[name].count:
                flat = parameter.detach().reshape(-1).cpu()
                delta.tensor(name).write(flat, 0, 0)
                parameter.copy_(flat.view(parameter.shape))
