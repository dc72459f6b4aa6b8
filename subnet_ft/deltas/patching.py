"""Deltas applied to the tensors of a checkpoint, piece by piece, checked by fingerprint before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import subnet_kernels
from subnet_ft.checkpoints import Checkpoint
from subnet_ft.deltas.checks import AnyDelta, check_chain, check_fits
from subnet_ft.deltas.delta import TensorDelta
from subnet_ft.deltas.header import TensorEntry
from subnet_ft.errors import DeltaError, DeltaMismatchError
from subnet_ft.masks import format_fingerprint
from subnet_kernels import BitMask

CHUNK = 1 << 20
"""Elements per piece: a multiple of 8, so that pieces meet at a byte of the bits."""

Replaced = Callable[[str, TensorEntry, TensorDelta], None]
"""Receives a parameter's name, and what would change it back."""

Write = Callable[[str, int, torch.Tensor], None]
"""Receives a tensor's name on disk, a byte in it, and the uint8 bytes from there on, valid until the call returns."""


class TensorPatch:
    """What the deltas of a chain do to one parameter.

    Args:
        name: The parameter.
        deltas: One, or several of which each belongs to the result of the one before.
        keep: Remember the values that are replaced.
    """

    def __init__(self, name: str, deltas: Sequence[AnyDelta], *, keep: bool = False) -> None:
        self.name = name
        self._deltas = deltas
        self._tensors = [delta.tensor(name) for delta in deltas]
        self._used = [0] * len(deltas)
        self._sums = [(0, 0)] * (len(deltas) + 1)
        self._bits = self._union() if keep else None  # of all weights that get a new value
        self._kept: list[torch.Tensor] = []

    def apply(self, piece: torch.Tensor, start: int) -> None:
        """Change one flat piece in place.

        Args:
            piece: Elements `start` to `start + n` of the parameter; pieces come in order and meet at multiples of 8.
            start: Flat index of the first element.
        """
        if self._bits is not None:
            bits = self._bits[start // 8 : (start + piece.numel() + 7) // 8]
            mask = BitMask.from_bits(bits, piece.numel())
            self._kept.append(subnet_kernels.gather(piece, mask, dtype=piece.dtype))
        sums: tuple[int, int] | None = None  # of the piece as it is
        for position, tensor in enumerate(self._tensors):
            part = tensor.part(start, piece.numel(), self._used[position])
            if part is not None:
                before, sums = subnet_kernels.patch(piece, *part, offset=start)
                self._used[position] += part[0].count
            elif sums is None:
                before = sums = subnet_kernels.fingerprint(piece, offset=start)
            if position == 0:
                self._sums[0] = added(self._sums[0], before)
            self._sums[position + 1] = added(self._sums[position + 1], sums)

    @property
    def fingerprints(self) -> list[str]:
        """Of the parameter before the first delta and after each; only after the last piece."""
        return [format_fingerprint(sums) for sums in self._sums]

    def problem(self) -> DeltaError | None:
        """Say what is wrong, after the last piece: the base is another one, or a delta does not give its result."""
        base, *results = self.fingerprints
        first = self._deltas[0]
        entry = first.entries[self.name]
        if base != entry.base:
            done = " They are those of its result: it has been applied already." if base == entry.result else ""
            at = f" at `{first.base.revision}`" if first.base.revision else ""
            return DeltaMismatchError(
                f"The weights of `{self.name}` are not those that the delta was made for (`{first.base.name}`{at}): "
                f"fingerprint {base}, expected {entry.base}.{done or ' Apply it to that base.'}"
            )
        for delta, result in zip(self._deltas, results, strict=True):
            if result != delta.entries[self.name].result:
                return DeltaError(
                    f"The delta does not give the result that it records for `{self.name}`: fingerprint {result}, "
                    f"expected {delta.entries[self.name].result}. It is damaged. Get it again."
                )
        return None

    def replaced(self) -> tuple[TensorEntry, TensorDelta]:
        """Return what changes the parameter back; only with `keep`, after the last piece."""
        assert self._bits is not None
        entry = self._deltas[0].entries[self.name]
        values = joined(self._kept) if self._kept else self._tensors[0].values
        result = self._deltas[-1].entries[self.name].result
        back = TensorEntry(entry.shape, entry.dtype, values.numel(), base=result, result=entry.base)
        return back, TensorDelta.build(self._bits, values, entry.shape)

    def _union(self) -> torch.Tensor:
        bits = self._tensors[0].full_bits()
        for tensor in self._tensors[1:]:
            bits = bits | tensor.full_bits()
        return bits


class Patch:
    """Deltas and the checkpoint that they belong to; nothing is read yet but headers.

    Args:
        checkpoint: The base.
        deltas: One, or several of which each belongs to the result of the one before.

    Raises:
        DeltaMismatchError: Names, shapes or dtypes are those of another model, or the deltas make no chain.
    """

    def __init__(self, checkpoint: Checkpoint, deltas: Sequence[AnyDelta]) -> None:
        self.checkpoint = checkpoint
        self.deltas = list(deltas)
        check_chain(self.deltas)
        check_fits(self.deltas[0], checkpoint)

    def changed_files(self) -> list[Path]:
        """Return the weight files in which something changes."""
        changed = {name for delta in self.deltas for name, entry in delta.entries.items() if entry.count}
        keys = [key for name in changed for key in self._keys(name)]
        keys += [key for key, name in self.checkpoint.copies.items() if name in changed]
        return sorted({self.checkpoint.stored[key].file for key in keys})

    def run(self, write: Write, replaced: Replaced | None = None) -> None:
        """Read every weight once, change it, and pass it on; what makes no parameter is left out.

        Args:
            write: Receives the bytes of every tensor on disk that is a parameter or a part or a copy of one.
            replaced: Receives what would change each parameter back, in the model's order.

        Raises:
            DeltaMismatchError: The base is another one.
            DeltaError: A delta does not give the result that it records.
        """
        done: dict[str, tuple[TensorEntry, TensorDelta] | None] = {}
        plain = [name for name in self.checkpoint.specs if self.checkpoint.stored_as_is(name) is not None]
        pieces = self.checkpoint.pieces(CHUNK, plain)
        for name in self.checkpoint.specs:
            key = self.checkpoint.stored_as_is(name)
            if key is not None:
                done[name] = self._patch(name, next(pieces)[1], _at(write, key), keep=replaced is not None)
            elif name not in done:
                done |= self._patch_group(name, write, keep=replaced is not None)
            back = done[name]
            done[name] = None
            if replaced is not None and back is not None:
                replaced(name, *back)
        for key, name in self.checkpoint.copies.items():
            self._patch(name, self._copy_pieces(key), _at(write, key), keep=False)

    def _keys(self, name: str) -> list[str]:
        key = self.checkpoint.stored_as_is(name)
        return [key] if key is not None else self.checkpoint.sources(name)

    def _patch(
        self, name: str, pieces: Iterator[torch.Tensor], write: Callable[[int, torch.Tensor], None], *, keep: bool
    ) -> tuple[TensorEntry, TensorDelta] | None:
        patch = TensorPatch(name, self.deltas, keep=keep)
        start = 0
        for piece in pieces:
            patch.apply(piece, start)
            write(start * piece.element_size(), piece.view(torch.uint8))
            start += piece.numel()
        problem = patch.problem()
        if problem is not None:
            raise problem
        return patch.replaced() if keep else None

    def _patch_group(self, name: str, write: Write, *, keep: bool) -> dict[str, tuple[TensorEntry, TensorDelta] | None]:
        """Change parameters that transformers makes out of other tensors, and take those apart again."""
        keys, origins = self.checkpoint.origins(name)
        parts = [self.checkpoint.read_stored(key).view(-1) for key in keys]
        whole = torch.cat(parts)
        done: dict[str, tuple[TensorEntry, TensorDelta] | None] = {}
        for member, origin in origins.items():
            flat = origin.view(-1)

            def put(offset: int, data: torch.Tensor, flat: torch.Tensor = flat) -> None:
                values = data.view(whole.dtype)
                start = offset // whole.element_size()
                whole[flat[start : start + values.numel()]] = values

            pieces = (whole[flat[start : start + CHUNK]] for start in range(0, flat.numel(), CHUNK))
            done[member] = self._patch(member, pieces, put, keep=keep)
        for key, part in zip(keys, torch.split(whole, [part.numel() for part in parts]), strict=True):
            write(key, 0, part.view(torch.uint8))
        return done

    def _copy_pieces(self, key: str) -> Iterator[torch.Tensor]:
        whole = self.checkpoint.read_stored(key).view(-1)
        return (whole[start : start + CHUNK].clone() for start in range(0, whole.numel(), CHUNK))


def _at(write: Write, key: str) -> Callable[[int, torch.Tensor], None]:
    return lambda offset, data: write(key, offset, data)


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put flat tensors of one dtype one after another, in this thread: torch's own threads would wait for each other.

    Args:
        parts: At least one.
    """
    whole = torch.empty(sum(part.numel() for part in parts), dtype=parts[0].dtype)
    np.concatenate([part.view(torch.uint8).numpy() for part in parts], out=whole.view(torch.uint8).numpy())
    return whole


def added(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
    """Add two fingerprints of parts of one tensor."""
    return (left[0] + right[0]) % 2**64, (left[1] + right[1]) % 2**64
