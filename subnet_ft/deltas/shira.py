"""A delta as an adapter that PEFT loads: SHiRA, sparse differences at fixed positions of linear layers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import subnet_kernels
from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.checkpoints.listing import listing
from subnet_ft.deltas.apply import check_new
from subnet_ft.deltas.checks import AnyDelta, check_fits, open_deltas
from subnet_ft.deltas.patching import TensorPatch
from subnet_ft.deltas.writing import sync_folder
from subnet_ft.errors import DeltaError, DeltaMismatchError
from subnet_ft.masks import SubnetMask

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from subnet_ft.deltas.header import TensorEntry

_WEIGHT = ".weight"


def export_shira(
    base: str | Path | Checkpoint,
    delta: str | Path | AnyDelta,
    output: str | Path,
    *,
    mask: SubnetMask | None = None,
    pad: bool = False,
) -> Path:
    """Write a delta as a SHiRA adapter, which on its base is the tuned model bit for bit, or refuse.

    SHiRA adds r (in + out) differences to every layer that it changes, one r for all of them. They are stored in
    float32, in which PEFT keeps and adds adapters unless it is told `autocast_adapter_dtype=False`, and it is checked
    that each sum rounds to the tuned weight. All of the adapter is in memory at once.

    Args:
        base: The base that the delta was made for.
        delta: The delta, or its file.
        output: The new folder; it appears whole or not at all.
        mask: For a delta file that refers to one.
        pad: Let layers with fewer new values than r (in + out) also list unchanged weights, with a difference of -0.0.

    Returns:
        The folder, with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        CheckpointError: The base cannot be found or read.
        DeltaFileError: The delta file breaks its format.
        DeltaMismatchError: The base is another one. Nothing was written.
        DeltaError: The counts are none that SHiRA has, weights of something else than a linear layer change, or a sum
            does not round to the tuned weight; the message has the numbers. Nothing was written.
    """
    from peft import ShiraConfig
    from safetensors.torch import save_file

    target = Path(output)
    check_new(target)
    (opened,) = open_deltas([delta], mask)
    checkpoint = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    check_fits(opened, checkpoint)
    changed = {name: entry for name, entry in opened.entries.items() if entry.count}
    _check_linear(checkpoint, changed)
    r = _rank(changed, pad=pad)
    tensors: dict[str, torch.Tensor] = {}
    inexact: dict[str, int] = {}
    for name, weight in checkpoint.tensors():
        patch = TensorPatch(name, [opened])
        tuned = weight.flatten().clone()
        patch.apply(tuned, 0)
        problem = patch.problem()
        if problem is not None:
            raise problem
        if name not in changed:
            continue
        rows, columns = weight.shape
        chosen = subnet_kernels.unpack_bits(opened.tensor(name).bits, tuned.numel())
        positions = _positions(chosen, r * (rows + columns))
        values, wrong = _differences(weight.flatten()[positions], tuned[positions], is_changed=chosen[positions])
        if wrong:
            inexact[name] = wrong
        key = f"base_model.model.{name.removesuffix(_WEIGHT)}"
        tensors[f"{key}.shira_weight"] = values
        tensors[f"{key}.shira_indices"] = torch.stack([positions // columns, positions % columns]).int()
    if inexact:
        raise DeltaError(
            f"SHiRA adds differences, and {sum(inexact.values()):,} of {sum(e.count for e in changed.values()):,} new "
            f"values are not what the sum rounds to: {listing([f'`{name}` {n:,}' for name, n in inexact.items()])}. "
            "Apply the delta instead, and use the dense checkpoint."
        )
    config = ShiraConfig(
        r=r,
        target_modules=sorted(name.removesuffix(_WEIGHT) for name in changed),
        base_model_name_or_path=checkpoint.name,
        revision=checkpoint.revision,
        inference_mode=True,
        task_type="CAUSAL_LM",
    )
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as staging:
        content = Path(staging) / "content"  # the folder around it is private; this one has ordinary permissions
        content.mkdir()
        save_file(tensors, content / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(content))
        sync_folder(content)
        os.rename(content, target)  # an empty folder is replaced
    sync_folder(target.absolute().parent)
    return target


def _check_linear(checkpoint: Checkpoint, changed: Iterable[str]) -> None:
    linear = {
        name + _WEIGHT
        for name, module in checkpoint.empty_model().named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    others = [name for name in changed if name not in linear]
    if others:
        raise DeltaMismatchError(
            f"SHiRA changes weights of linear layers only, and the delta also changes {listing(others)}. Apply the "
            "delta instead, or train with a mask of linear layers."
        )


def _rank(changed: Mapping[str, TensorEntry], *, pad: bool) -> int:
    """Return the one r, or refuse with the count that each layer has and the one that it would need."""
    if not changed:
        raise DeltaError("The delta changes no weight, so there is nothing to adapt: use the base.")
    r = max(-(-entry.count // sum(entry.shape)) for entry in changed.values())
    full = [
        f"`{name}` has {entry.count:,} and would need {r * sum(entry.shape):,} of {entry.num_elements:,} weights"
        for name, entry in changed.items()
        if r * sum(entry.shape) > entry.num_elements
    ]
    if full:
        raise DeltaError(
            f"SHiRA has r (in + out) values in every layer, here with r = {r}, and no layer holds as many: "
            f"{listing(full)}. Apply the delta instead."
        )
    odd = [
        f"`{name}` has {entry.count:,}, not {r * sum(entry.shape):,}"
        for name, entry in changed.items()
        if entry.count != r * sum(entry.shape)
    ]
    if odd and not pad:
        raise DeltaError(
            f"SHiRA has r (in + out) values in every layer, with one r for all, and the delta has other counts of new "
            f"values in {len(odd)} of {len(changed)} layers; for r = {r}: {listing(odd)}. Fill up with unchanged "
            "weights (`--pad`), or apply the delta instead."
        )
    return r


def _positions(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Return (count,) sorted flat indices: all chosen ones, and the first others."""
    positions = chosen.nonzero().view(-1)
    missing = count - positions.numel()
    if not missing:
        return positions
    others = chosen.logical_not().nonzero().view(-1)[:missing]
    return torch.cat([positions, others]).sort().values


def _differences(old: torch.Tensor, new: torch.Tensor, *, is_changed: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return float32 differences, and for how many of them PEFT's sum does not have the bits of the new value."""
    # What is added to a weight that does not change must keep also -0.0.
    values = torch.where(is_changed, new.float() - old.float(), -0.0)
    _, wrong = subnet_kernels.changed_bits((old.float() + values).to(new.dtype), new)
    return values, wrong
