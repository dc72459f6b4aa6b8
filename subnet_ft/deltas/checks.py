"""Whether deltas, checkpoints and each other fit, by what their headers say."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from subnet_ft.checkpoints import Checkpoint
from subnet_ft.checkpoints.listing import listing
from subnet_ft.deltas.delta import Delta
from subnet_ft.deltas.download import located
from subnet_ft.deltas.file import DeltaFile
from subnet_ft.deltas.header import TensorEntry
from subnet_ft.errors import DeltaError, DeltaMismatchError
from subnet_ft.masks import SubnetMask

AnyDelta = Delta | DeltaFile
"""A delta in memory, or its file, of which one tensor at a time is read."""


def open_deltas(
    deltas: str | Path | AnyDelta | Sequence[str | Path | AnyDelta],
    masks: SubnetMask | Sequence[SubnetMask] | None = None,
) -> list[AnyDelta]:
    """Open one delta, or a chain of them.

    Args:
        deltas: Files, `hub:OWNER/NAME[@REVISION]`, or deltas that are open already.
        masks: For the files that refer to one.

    Raises:
        DeltaFileError: A file breaks its format.
        DeltaMismatchError: A file refers to another mask, or no file refers to any.
        DeltaError: None was named, or the Hub cannot be reached, or has none.
    """
    several = [deltas] if isinstance(deltas, (str, Path, Delta, DeltaFile)) else list(deltas)
    if not several:
        raise DeltaError("No delta was given. Name at least one.")
    opened = [delta if isinstance(delta, (Delta, DeltaFile)) else DeltaFile(located(delta)) for delta in several]
    given = [masks] if isinstance(masks, SubnetMask) else list(masks or ())
    if not given:
        return opened
    referring = [
        delta for delta in opened if isinstance(delta, DeltaFile) and delta.header.mask_fingerprint is not None
    ]
    if not referring:
        raise DeltaMismatchError("Every delta that was given has its own positions. Leave out the mask.")
    by_fingerprint = {mask.fingerprint: mask for mask in given}
    with_masks = {
        id(delta): delta.with_mask(by_fingerprint.get(delta.header.mask_fingerprint or "", given[0]))
        for delta in referring
        if not delta.has_positions
    }
    unused = by_fingerprint.keys() - {delta.header.mask_fingerprint for delta in referring}
    if unused:
        raise DeltaMismatchError(f"No delta refers to the mask with the fingerprint {min(unused)}. Leave it out.")
    return [with_masks.get(id(delta), delta) for delta in opened]


def model_digest(fingerprints: Mapping[str, str]) -> str:
    """Return the SHA-256 of all fingerprints of a model: one short name for its weights, as hexadecimal digits."""
    lines = "".join(f"{name}\0{fingerprints[name]}\n" for name in sorted(fingerprints))
    return hashlib.sha256(lines.encode(errors="surrogatepass")).hexdigest()


def base_digest(delta: AnyDelta) -> str:
    """Return the digest of the weights that a delta belongs to."""
    return model_digest({name: entry.base for name, entry in delta.entries.items()})


def result_digest(delta: AnyDelta) -> str:
    """Return the digest of the weights that a delta makes."""
    return model_digest({name: entry.result for name, entry in delta.entries.items()})


def check_fits(delta: AnyDelta, checkpoint: Checkpoint) -> None:
    """Check names, shapes and dtypes of a checkpoint against a delta; weights stay unread.

    Raises:
        DeltaMismatchError: Something differs; the message names the tensor and both values.
    """
    found = {name: (spec.shape, str(spec.dtype).removeprefix("torch.")) for name, spec in checkpoint.specs.items()}
    check_same_tensors(delta.entries, found, "the delta", f"`{checkpoint.name}`")


def check_same_tensors(
    entries: Mapping[str, TensorEntry], found: Mapping[str, tuple[tuple[int, ...], str]], left: str, right: str
) -> None:
    """Check that two sides name the same parameters in the same shapes and dtypes.

    Args:
        entries: One side, called `left` in messages.
        found: Shape and dtype of the parameters of the other, called `right`.

    Raises:
        DeltaMismatchError: Something differs.
    """
    missing = [name for name in entries if name not in found]
    extra = [name for name in found if name not in entries]
    if missing or extra:
        raise DeltaMismatchError(
            f"{left[0].upper()}{left[1:]} and {right} have different parameters: {listing(missing)} only in the "
            f"former, {listing(extra)} only in the latter. They are different models."
        )
    for name, entry in entries.items():
        shape, dtype = found[name]
        if shape != entry.shape:
            raise DeltaMismatchError(
                f"`{name}` has shape {entry.shape} in {left} and {shape} in {right}. They are different models."
            )
        if dtype != entry.dtype:
            raise DeltaMismatchError(
                f"`{name}` is {entry.dtype} in {left} and {dtype} in {right}. A delta holds bits, so the dtypes must "
                f"be the same: load the latter with `from_pretrained(..., dtype=torch.{entry.dtype})`, save it with "
                "`save_pretrained`, and use that folder."
            )


def check_chain(deltas: Sequence[AnyDelta]) -> None:
    """Check that each delta belongs to the result of the one before it.

    Raises:
        DeltaMismatchError: One does not.
    """
    for number, (before, after) in enumerate(itertools.pairwise(deltas), start=1):
        between = (f"delta {number}", f"delta {number + 1}")
        found = {name: (entry.shape, entry.dtype) for name, entry in after.entries.items()}
        check_same_tensors(before.entries, found, *between)
        for name, entry in after.entries.items():
            if entry.base != before.entries[name].result:
                raise DeltaMismatchError(
                    f"{between[1].capitalize()} does not belong to the result of {between[0]}: it was made for "
                    f"`{name}` with the fingerprint {entry.base}, and the result has {before.entries[name].result}. "
                    "Give the deltas of a chain in the order in which they were made."
                )


def check_one_base(left: AnyDelta, right: AnyDelta) -> None:
    """Check that two deltas belong to one base.

    Raises:
        DeltaMismatchError: They do not.
    """
    found = {name: (entry.shape, entry.dtype) for name, entry in right.entries.items()}
    check_same_tensors(left.entries, found, "the first delta", "the second")
    for name, entry in left.entries.items():
        if entry.base != right.entries[name].base:
            raise DeltaMismatchError(
                f"The deltas belong to different bases, `{left.base.name}` and `{right.base.name}`: `{name}` has the "
                f"fingerprint {entry.base} in the one and {right.entries[name].base} in the other. Only deltas of one "
                "base have positions in common."
            )
