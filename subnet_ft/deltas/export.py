"""Making deltas: from two checkpoints, or from the weights of a masked run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

import subnet_kernels
from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.checkpoints.listing import listing
from subnet_ft.deltas.checks import check_same_tensors
from subnet_ft.deltas.delta import Delta, TensorDelta
from subnet_ft.deltas.file import DeltaFile
from subnet_ft.deltas.header import DTYPES, TensorEntry
from subnet_ft.deltas.patching import CHUNK, added, joined
from subnet_ft.deltas.writing import DeltaWriter
from subnet_ft.errors import DeltaError, DeltaMismatchError
from subnet_ft.masks import ModelRecord, SubnetMask, format_fingerprint
from subnet_kernels import BitMask

if TYPE_CHECKING:
    from tqdm import tqdm

_NOTHING = torch.empty(0, dtype=torch.uint8)


def export_delta(
    base: str | Path | Checkpoint,
    tuned: str | Path | Checkpoint,
    path: str | Path,
    *,
    mask: SubnetMask | str | Path | None = None,
    mask_reference: bool = False,
    zstd: bool = False,
    progress: bool = False,
) -> DeltaFile:
    """Write what training changed to a delta file, streaming over two checkpoints of any origin.

    Args:
        base: The checkpoint before training: a folder, a Hub id, a GGUF or an open `Checkpoint`.
        tuned: The checkpoint after training, in the same dtypes: of a masked or a full run, a merged adapter, ...
        path: `NAME.delta.safetensors`; a file of that name is replaced.
        mask: Store the values of exactly these weights, changed or not; a weight outside that changed is an error.
        mask_reference: Store no positions but the fingerprint of `mask`, which whoever reads the file needs then.
        zstd: Compress.
        progress: Show a progress bar on standard error.

    Returns:
        The file, opened.

    Raises:
        CheckpointError: A checkpoint cannot be found or read, or `apply_delta` was interrupted in it.
        DeltaMismatchError: The checkpoints have other tensors, shapes, dtypes or buffers, or the mask leaves out
            weights that changed.
        MaskMismatchError: The mask belongs to another base.
        DeltaFileError: The file cannot be written.
        DeltaError: `mask_reference` without a mask.
        MissingDependencyError: zstandard is not installed.
    """
    if mask_reference and mask is None:
        raise DeltaError("A delta that refers to a mask needs that mask. Name it (`--mask`), or store the positions.")
    chosen = SubnetMask.load(mask) if isinstance(mask, (str, Path)) else mask
    before = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    after = tuned if isinstance(tuned, Checkpoint) else open_checkpoint(tuned)
    shapes = {name: (spec.shape, _dtype_name(spec.dtype)) for name, spec in after.specs.items()}
    entries = {name: TensorEntry(spec.shape, _dtype_name(spec.dtype), 0, "", "") for name, spec in before.specs.items()}
    check_same_tensors(entries, shapes, f"the base `{before.name}`", f"`{after.name}`")
    _check_buffers(before, after)
    if chosen is not None:
        chosen.check_shapes({name: spec.shape for name, spec in before.specs.items()})
    source = {"kind": "export", "tuned": after.name, "tuned_revision": after.revision}
    record = ModelRecord(before.name, before.revision)
    total = sum(entry.num_elements for entry in entries.values())
    referred = chosen if mask_reference else None
    with (
        DeltaWriter(path, record, source, mask=referred, zstd=zstd) as writer,
        _progress_bar(total, enabled=progress) as bar,
    ):
        for (name, old), (_, new) in zip(before.pieces(CHUNK), after.pieces(CHUNK, before.specs), strict=True):
            writer.add(name, *_compared(name, entries[name], zip(old, new, strict=True), chosen, bar))
    return DeltaFile(path, referred)


def masked_delta(
    weights: Iterable[tuple[str, torch.Tensor]],
    mask: SubnetMask,
    *,
    frozen: Mapping[str, tuple[int, int]],
    source: Mapping[str, Any] | None = None,
) -> Delta:
    """Take the delta of a masked run from its weights in memory: the mask has the positions, nothing is compared.

    That no other weight changed is checked by fingerprint, so that nothing is left out in silence.

    Args:
        weights: Every parameter of the mask with its tensor, on any device.
        mask: The run's mask, with the record of its base.
        frozen: Parameter name to `subnet_kernels.fingerprint(tensor, outside=mask)` at the start of the run.
        source: `kind` and what else says where the delta comes from.

    Raises:
        DeltaError: The mask does not record its base, or `weights` are in another dtype than that.
        DeltaMismatchError: A weight outside the mask changed, or `frozen` or the base's record lack a parameter.
        MaskMismatchError: `weights` are not those of the mask.
    """
    base = mask.provenance.base
    if base is None:
        raise DeltaError("The mask does not record its base, so its delta would belong to no model. Extract it again.")
    tensors: dict[str, TensorDelta] = {}
    result: dict[str, str] = {}
    by_name = dict(weights)
    mask.check_shapes({name: tuple(weight.shape) for name, weight in by_name.items()})
    for what, names in (
        ("`frozen` has no fingerprint", frozen),
        ("The record of the mask's base has no fingerprint", base.fingerprints),
        ("The record of the mask's base has no dtype", base.dtypes),
    ):
        missing = [name for name in mask.tensors if name not in names]
        if missing:
            raise DeltaMismatchError(
                f"{what} of {listing(missing)}, so what was frozen cannot be checked. Take the fingerprints of all "
                "parameters at the start of the run, with the mask that it trains."
            )
    for name, tensor in mask.tensors.items():
        weight = by_name[name]
        if _dtype_name(weight.dtype) != base.dtypes[name]:
            raise DeltaError(
                f"The weights of `{name}` are {_dtype_name(weight.dtype)} but its base is {base.dtypes[name]}; a delta "
                "holds the stored dtype. Load the model in it, or export from saved checkpoints."
            )
        flat = weight.detach().reshape(-1)
        bits = BitMask.from_bits(tensor.full_bits(), tensor.num_elements, flat.device)
        outside = subnet_kernels.fingerprint(flat, outside=bits)
        if outside != tuple(frozen[name]):
            raise DeltaMismatchError(
                f"Weights of `{name}` outside the mask changed: fingerprint {format_fingerprint(outside)}, at the "
                f"start of the run {format_fingerprint(frozen[name])}. A delta of the mask would leave them out."
            )
        if not tensor.count and format_fingerprint(outside) != base.fingerprints[name]:
            raise DeltaMismatchError(
                f"`{name}` is not that of the mask's base `{base.name}`: fingerprint {format_fingerprint(outside)}, "
                f"recorded {base.fingerprints[name]}. The run began with other weights, or in another dtype."
            )
        values = subnet_kernels.gather(flat, bits, dtype=flat.dtype).cpu()
        tensors[name] = TensorDelta(tensor.bits, values, tensor.shape)
        result[name] = format_fingerprint(subnet_kernels.fingerprint(flat)) if tensor.count else base.fingerprints[name]
    return Delta(tensors, base, result, dict(source or {"kind": "masked"}))


def _check_buffers(before: Checkpoint, after: Checkpoint) -> None:
    """Refuse what a delta would leave out: it carries parameters, and `apply` takes everything else from the base."""
    kept = before.ignored.keys() - before.copies.keys()
    for key in sorted(after.ignored.keys() - after.copies.keys()):
        reason = after.ignored[key]
        if key in kept and not _is_stored_alike(before, after, key):
            problem = f"differs between the base `{before.name}` and `{after.name}`"
        elif key not in kept and reason == "a buffer":
            problem = f"is in `{after.name}` and not in the base `{before.name}`"
        else:
            continue
        raise DeltaMismatchError(
            f"`{key}`, {reason}, {problem}. A delta carries parameters only, so it would be lost. Keep it as it is in "
            "training, or share the dense checkpoint."
        )


def _is_stored_alike(before: Checkpoint, after: Checkpoint, key: str) -> bool:
    first, second = (_stored_bytes(checkpoint, key) for checkpoint in (before, after))
    return first[:2] == second[:2] and torch.equal(first[2], second[2])


def _stored_bytes(checkpoint: Checkpoint, key: str) -> tuple[torch.dtype, tuple[int, ...], torch.Tensor]:
    from safetensors import safe_open

    if checkpoint.is_in_parts:
        tensor = checkpoint.read_stored(key)
    else:
        with safe_open(checkpoint.stored[key].file, framework="pt") as file:  # buffers have any dtype
            tensor = file.get_tensor(key)
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8)


def _compared(
    name: str,
    entry: TensorEntry,
    pieces: Iterable[tuple[torch.Tensor, torch.Tensor]],
    mask: SubnetMask | None,
    bar: tqdm[NoReturn],
) -> tuple[TensorEntry, TensorDelta]:
    """Compare one parameter of two checkpoints, given as pairs of flat pieces."""
    chosen = None if mask is None else mask.tensors[name].full_bits()
    all_bits: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    base_sums, result_sums, start = (0, 0), (0, 0), 0
    for old, new in pieces:
        found = subnet_kernels.compare(old, new, offset=start)
        base_sums = added(base_sums, found.base_fingerprint)
        result_sums = added(result_sums, found.tuned_fingerprint)
        bits = found.bits
        if chosen is not None:
            bits = chosen[start // 8 : (start + old.numel() + 7) // 8]
            left_out = subnet_kernels.count_bits(found.bits & ~bits)
            if left_out:
                raise DeltaMismatchError(
                    f"{left_out:,} weights of `{name}` changed outside the mask, among the elements from {start:,} on. "
                    "Export without the mask, or name the run's own."
                )
        all_bits.append(bits.clone())
        values.append(subnet_kernels.gather(new, BitMask.from_bits(bits, new.numel()), dtype=new.dtype))
        start += old.numel()
        bar.update(old.numel())
    new_values = joined(values) if values else torch.empty(0, dtype=DTYPES[entry.dtype])
    base, result = format_fingerprint(base_sums), format_fingerprint(result_sums)
    if mask is not None:
        mask.check_fingerprint(name, DTYPES[entry.dtype], base_sums)
    described = TensorEntry(entry.shape, entry.dtype, new_values.numel(), base, result)
    return described, TensorDelta(joined(all_bits) if described.count else _NOTHING, new_values, entry.shape)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _progress_bar(total: int, *, enabled: bool) -> tqdm[NoReturn]:
    from tqdm import tqdm

    return tqdm(total=total, desc="Comparing weights", unit="weight", unit_scale=True, disable=not enabled)
