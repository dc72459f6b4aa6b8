"""Whether a delta belongs to a base, and leads to a tuned checkpoint; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import subnet_kernels
from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.deltas.checks import AnyDelta, check_fits, open_deltas
from subnet_ft.deltas.patching import CHUNK, Patch, TensorPatch, added
from subnet_ft.masks import SubnetMask, format_fingerprint


@dataclass(frozen=True)
class DeltaCheck:
    """What `verify_delta` found.

    Args:
        wrong_base: Parameters of which the base has other weights than the delta was made for.
        wrong_result: Parameters of which the base with the delta has other weights than the delta records.
        wrong_tuned: Parameters of which the tuned checkpoint has other weights than that; `None` if none was named.
    """

    wrong_base: list[str]
    wrong_result: list[str]
    wrong_tuned: list[str] | None

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.wrong_base or self.wrong_result or self.wrong_tuned)


def verify_delta(
    base: str | Path | Checkpoint,
    delta: str | Path | AnyDelta | Sequence[str | Path | AnyDelta],
    tuned: str | Path | Checkpoint | None = None,
    *,
    mask: SubnetMask | None = None,
) -> DeltaCheck:
    """Check by fingerprint that a delta, or a chain of them, belongs to a base and leads to a tuned checkpoint.

    Raises:
        CheckpointError: A checkpoint cannot be found or read.
        DeltaFileError: A delta file breaks its format.
        DeltaMismatchError: Names, shapes or dtypes are those of another model, or the deltas make no chain.
    """
    deltas = open_deltas(delta, mask)
    checkpoint = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    Patch(checkpoint, deltas)  # checks what the headers say
    after = tuned if tuned is None or isinstance(tuned, Checkpoint) else open_checkpoint(tuned)
    if after is not None:
        check_fits(deltas[-1], after)
    wrong_base: list[str] = []
    wrong_result: list[str] = []
    for name, pieces in checkpoint.pieces(CHUNK):
        patch, start = TensorPatch(name, deltas), 0
        for piece in pieces:
            patch.apply(piece, start)
            start += piece.numel()
        before, *made = patch.fingerprints
        if before != deltas[0].entries[name].base:
            wrong_base.append(name)
        if made != [delta.entries[name].result for delta in deltas]:
            wrong_result.append(name)
    expected = {name: entry.result for name, entry in deltas[-1].entries.items()}
    return DeltaCheck(wrong_base, wrong_result, None if after is None else wrong_weights(after, expected))


def wrong_weights(checkpoint: Checkpoint, expected: Mapping[str, str]) -> list[str]:
    """Return the parameters of a checkpoint that do not have the expected fingerprints, 32 digits each by name."""
    wrong = []
    for name, pieces in checkpoint.pieces(CHUNK):
        sums, start = (0, 0), 0
        for piece in pieces:
            sums = added(sums, subnet_kernels.fingerprint(piece, offset=start))
            start += piece.numel()
        if format_fingerprint(sums) != expected.get(name):
            wrong.append(name)
    return wrong
