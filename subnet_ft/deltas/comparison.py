"""Two deltas beside each other: what they have in common, and one delta that does what both do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import subnet_kernels
from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.deltas.checks import AnyDelta, check_chain, check_fits, check_one_base, open_deltas
from subnet_ft.deltas.delta import TensorDelta
from subnet_ft.deltas.file import DeltaFile
from subnet_ft.deltas.header import TensorEntry
from subnet_ft.deltas.patching import CHUNK, added, joined
from subnet_ft.deltas.writing import DeltaWriter
from subnet_ft.errors import DeltaError, DeltaMismatchError
from subnet_ft.masks import ModelRecord, format_fingerprint
from subnet_kernels import BitMask

OnConflict = Literal["error", "first", "second"]
CONFLICT_POLICIES = ("error", "first", "second")


@dataclass(frozen=True)
class TensorDifference:
    """What two deltas of one base do to a tensor, or to a whole model.

    Args:
        first: Weights that the first gives a new value.
        second: The same for the second.
        shared: Weights that both do.
        equal: Those of them that get the same bits from both.
    """

    first: int
    second: int
    shared: int
    equal: int


def diff_deltas(first: str | Path | AnyDelta, second: str | Path | AnyDelta) -> dict[str, TensorDifference]:
    """Compare two deltas of one base, tensor by tensor.

    Returns:
        Every parameter, in the model's order.

    Raises:
        DeltaMismatchError: They belong to different bases.
    """
    left, right = open_deltas([first, second])
    check_one_base(left, right)
    return {name: _difference(left.tensor(name), right.tensor(name)) for name in left.entries}


def compose_deltas(
    first: str | Path | AnyDelta,
    second: str | Path | AnyDelta,
    path: str | Path,
    *,
    base: str | Path | Checkpoint | None = None,
    on_conflict: OnConflict = "error",
    zstd: bool = False,
) -> DeltaFile:
    """Write one delta that does what two do: two of one base, or one and another that belongs to its result.

    Args:
        first, second: The deltas. Of a chain, the one that belongs to the other's result is the second.
        path: `NAME.delta.safetensors`; a file of that name is replaced, also `first` or `second`.
        base: Their base; the fingerprints of the result come from it. When `None`, the folder of the name that `first`
            gives its base; any other name is a stranger's word, and neither fetched nor imported.
        on_conflict: What happens where both give a weight different values: refuse, or take the value of `first` or
            `second`. In a chain it is always the second's.
        zstd: Compress.

    Returns:
        The file, opened.

    Raises:
        DeltaMismatchError: The deltas belong to different bases, conflict, or `base` is another model.
        DeltaError: `on_conflict` is unknown, or `base` is missing.
    """
    if on_conflict not in CONFLICT_POLICIES:
        raise DeltaError(f"`on_conflict` must be one of {', '.join(CONFLICT_POLICIES)}, got {on_conflict!r}.")
    left, right = open_deltas([first, second])
    is_chain = _is_chain(left, right)
    if not is_chain:
        check_one_base(left, right)
    if not isinstance(base, Checkpoint):
        base = open_checkpoint(_named_folder(left) if base is None else base)
    checkpoint = base
    check_fits(left, checkpoint)
    source = {"kind": "compose", "of": [left.base.name, right.base.name], "on_conflict": on_conflict}
    record = ModelRecord(left.base.name, left.base.revision)
    with DeltaWriter(path, record, source, zstd=zstd) as writer:
        for name, pieces in checkpoint.pieces(CHUNK, left.entries):
            both = (left.tensor(name), right.tensor(name))
            if on_conflict == "error" and not is_chain:
                _refuse_conflict(name, _difference(*both))
            later_wins = both[::-1] if on_conflict == "first" and not is_chain else both
            bits = both[0].full_bits() | both[1].full_bits()
            values: list[torch.Tensor] = []
            before, after, start = (0, 0), (0, 0), 0
            used = [0, 0]
            for piece in pieces:
                before = added(before, subnet_kernels.fingerprint(piece, offset=start))
                for position, tensor in enumerate(later_wins):
                    used[position] += tensor.write(piece, start, used[position])
                after = added(after, subnet_kernels.fingerprint(piece, offset=start))
                part = BitMask.from_bits(bits[start // 8 : (start + piece.numel() + 7) // 8], piece.numel())
                values.append(subnet_kernels.gather(piece, part, dtype=piece.dtype))
                start += piece.numel()
            entry = left.entries[name]
            if format_fingerprint(before) != entry.base:
                raise DeltaMismatchError(
                    f"The weights of `{name}` in `{checkpoint.name}` are not those that the deltas were made for: "
                    f"fingerprint {format_fingerprint(before)}, expected {entry.base}. Name their base (`--base`)."
                )
            composed = TensorDelta.build(bits, joined(values) if values else both[0].values, entry.shape)
            result = format_fingerprint(after)
            writer.add(name, TensorEntry(entry.shape, entry.dtype, composed.count, entry.base, result), composed)
    return DeltaFile(path)


def _named_folder(delta: AnyDelta) -> str:
    name = delta.base.name
    if not os.path.isdir(name):
        raise DeltaError(
            f"The delta calls its base {name!r}, which is no folder here, and what a delta says is never fetched. Name "
            "its base (`--base`)."
        )
    return name


def _is_chain(left: AnyDelta, right: AnyDelta) -> bool:
    if all(entry.base == right.entries[name].base for name, entry in left.entries.items() if name in right.entries):
        return False
    try:
        check_chain([left, right])
    except DeltaMismatchError:
        return False
    return True


def _difference(left: TensorDelta, right: TensorDelta) -> TensorDifference:
    if not left.count or not right.count:
        return TensorDifference(left.count, right.count, 0, 0)
    shared = BitMask.from_bits(left.bits & right.bits, left.num_elements)
    values = []
    for tensor in (left, right):
        dense = torch.zeros(tensor.num_elements, dtype=tensor.values.dtype)
        tensor.write(dense, 0, 0)
        values.append(subnet_kernels.gather(dense, shared, dtype=dense.dtype))
    _, differing = subnet_kernels.changed_bits(*values)
    return TensorDifference(left.count, right.count, shared.count, shared.count - differing)


def _refuse_conflict(name: str, found: TensorDifference) -> None:
    conflicts = found.shared - found.equal
    if conflicts:
        raise DeltaMismatchError(
            f"The deltas give {conflicts:,} of the {found.shared:,} weights of `{name}` that both change different "
            "values. Choose whose count with `--on-conflict first` or `second`."
        )
