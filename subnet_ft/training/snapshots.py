"""Which weights differed from the base at which step: one bit per weight and snapshot, in files by step."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import subnet_kernels
from subnet_ft.checkpoints import Checkpoint
from subnet_ft.errors import TrainerError
from subnet_ft.masks import TensorMask, format_fingerprint

SNAPSHOTS = "dynamics"
"""Folder of the bitmaps, beside a trainer's checkpoints."""

_PIECE = 1 << 20  # weights compared at a time; a multiple of 8
PIECE_BYTES = 3 * 4 * _PIECE
"""Bytes at most of what a comparison holds beside the bits: a piece as stored, cast, and as integers."""

_NAME = re.compile(r"step-(\d+)\.safetensors")


@dataclass(frozen=True)
class Taken:
    """What a snapshot says besides its bits.

    Args:
        step: Optimizer steps that the run had taken.
        every: Steps from one snapshot to the next, as the run was set up.
        base: Digest of the base that the weights were compared with.
        num_parameters: Weights of the model.
        num_trainable: Weights of the mask that trained.
        num_updates, num_changed, num_kept_back, num_rounded_away: Counts of a `StepWatch` over the step that ended
            here; `None` where they are not known.
        bitmap_bytes: Bytes of the bits.
        seconds: Wall time that the snapshot took, but for writing it.
        peak_bytes: Most memory that it held.
    """

    step: int
    every: int
    base: str
    num_parameters: int
    num_trainable: int
    num_updates: int | None
    num_changed: int | None
    num_kept_back: int | None
    num_rounded_away: int | None
    bitmap_bytes: int
    seconds: float
    peak_bytes: int


def digest_of(base: Checkpoint, parameters: Mapping[str, torch.Tensor]) -> tuple[str, str | None]:
    """Pass over a base in the dtypes of a model's weights.

    Args:
        base: The base.
        parameters: Name to weights, all of the model.

    Returns:
        A digest of the base, and the name of the first tensor in which the two differ; `None` where none does.

    Raises:
        TrainerError: They do not have the same tensors.
    """
    _check_names(base, parameters)
    digest, other = hashlib.sha256(), None
    for name, pairs in _pairs(base, parameters):
        sums, offset, count = (0, 0), 0, 0
        for stored, live in pairs:
            found = subnet_kernels.compare(stored, live, offset=offset)
            first, second = found.base_fingerprint
            sums = ((sums[0] + first) % 2**64, (sums[1] + second) % 2**64)
            offset, count = offset + stored.numel(), count + found.count
        digest.update(f"{name}\0{parameters[name].dtype}\0{format_fingerprint(sums)}\0".encode())
        if count and other is None:
            other = name
    return digest.hexdigest(), other


def changed_weights(base: Checkpoint, parameters: Mapping[str, torch.Tensor]) -> dict[str, TensorMask]:
    """Return by tensor which weights have other bits than the base, in the dtypes of the weights."""
    found = {}
    for name, pairs in _pairs(base, parameters):
        pieces = [subnet_kernels.changed_bits(stored, live)[0].cpu() for stored, live in pairs]
        found[name] = TensorMask.build(torch.cat(pieces), tuple(parameters[name].shape))
    return found


def _pairs(
    base: Checkpoint, parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, Iterator[tuple[torch.Tensor, torch.Tensor]]]]:
    """Yield every tensor in flat pieces of the base and of the weights, where the weights are and in their dtype."""
    for name, pieces in base.pieces(_PIECE, list(parameters)):
        weights = parameters[name].detach().reshape(-1)
        live = (weights[start : start + _PIECE] for start in range(0, weights.numel(), _PIECE))
        yield name, ((piece.to(w.device, w.dtype), w) for piece, w in zip(pieces, live, strict=True))


def _check_names(base: Checkpoint, parameters: Mapping[str, torch.Tensor]) -> None:
    shapes = {name: tuple(weights.shape) for name, weights in parameters.items()}
    for name, shape in shapes.items():
        if name not in base.specs or base.specs[name].shape != shape:
            found = f"of shape {base.specs[name].shape}" if name in base.specs else "missing"
            raise TrainerError(
                f"The base `{base.name}` is not that of this model: `{name}` of shape {shape} is {found} there. Pass "
                "the checkpoint that the model was loaded from. An adapter has no weights in its base, and no dynamics."
            )


class Snapshots:
    """The snapshots of a run in a folder; what is written is whole or not there.

    Args:
        folder: Made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Return the steps of which there is a snapshot, rising."""
        found = [_NAME.fullmatch(path.name) for path in self.folder.glob("step-*.safetensors")]
        return sorted(int(match[1]) for match in found if match)

    def write(self, taken: Taken, changed: Mapping[str, TensorMask]) -> None:
        """Write one, in the place of an older one of that step."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(taken.step)
        unfinished = path.with_suffix(".unfinished")
        bits = {name: tensor.bits for name, tensor in changed.items() if tensor.count}
        save_file(bits, unfinished, metadata={"snapshot": json.dumps(asdict(taken))})
        os.replace(unfinished, path)

    def taken(self, step: int) -> Taken:
        """Return what a snapshot says besides its bits."""
        with self._open(step) as file:
            return Taken(**json.loads(file.metadata()["snapshot"]))

    def keep(self, steps: set[int]) -> None:
        """Remove the snapshots of all other steps, and what a killed run left unfinished."""
        for path in self.folder.glob("step-*"):
            match = _NAME.fullmatch(path.name)
            if match is None or int(match[1]) not in steps:
                path.unlink()

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def walk(self) -> Iterator[tuple[Taken, Counts]]:
        """Yield every snapshot with its counts, at the memory of one bitmap of the model.

        The last snapshot is the final mask.
        """
        ever: dict[str, torch.Tensor] = {}
        steps = self.steps()
        final = before = self._open(steps[-1])
        in_final, in_before = set(final.keys()), set[str]()
        for step in steps:
            now = self._open(step)
            counts, in_now = Counts(), set(now.keys())
            for name in in_now | in_before | in_final:
                bits = now.get_tensor(name) if name in in_now else None
                counts.add(
                    bits,
                    before=before.get_tensor(name) if name in in_before else None,
                    final=final.get_tensor(name) if name in in_final else None,
                )
                if bits is not None:
                    ever[name] = bits | ever[name] if name in ever else bits
            counts.ever = sum(subnet_kernels.count_bits(bits) for bits in ever.values())
            yield Taken(**json.loads(now.metadata()["snapshot"])), counts
            before, in_before = now, in_now

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def _open(self, step: int) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self._path(step), framework="pt")
        except SafetensorError as error:
            raise TrainerError(
                f"`{self._path(step)}` cannot be read ({error}). Without that snapshot the dynamics of the run are not "
                "known: train again, or without this callback."
            ) from error


@dataclass
class Counts:
    """Numbers of weights over all tensors: of a snapshot (`now`), the one before it and the last one (`final`)."""

    now: int = 0
    now_and_before: int = 0
    now_or_before: int = 0
    now_and_final: int = 0
    ever: int = 0
    """Of this snapshot or an earlier one."""
    final: int = 0

    def add(self, now: torch.Tensor | None, *, before: torch.Tensor | None, final: torch.Tensor | None) -> None:
        """Count the bits of one tensor; `None` stands for no bit."""
        self.now += _count(now)
        self.final += _count(final)
        if now is not None and final is not None:
            self.now_and_final += _count(now & final)
        both = 0 if now is None or before is None else _count(now & before)
        self.now_and_before += both
        self.now_or_before += _count(now) + _count(before) - both


def _count(bits: torch.Tensor | None) -> int:
    return 0 if bits is None else subnet_kernels.count_bits(bits)
