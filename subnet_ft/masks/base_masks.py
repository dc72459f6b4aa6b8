"""Masks from base weights alone, for a subnetwork run without any run before it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

import subnet_kernels
from subnet_ft.checkpoints import Checkpoint, open_checkpoint
from subnet_ft.errors import MaskError
from subnet_ft.masks.controls import rank_source, ranked
from subnet_ft.masks.mask import SubnetMask, TensorMask
from subnet_ft.masks.provenance import COMPARE_DTYPES, ModelRecord, Provenance, format_fingerprint
from subnet_ft.masks.selection import KeyPieces, lowest_overall, tiles
from subnet_ft.masks.spacing import NUM_REACHES, reach_keys, reach_of

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

BASE_KINDS = ("low_magnitude", "predicted", "principal", "non_principal", "uniform")
SCOPES = ("tensor", "global")


def base_mask(
    checkpoint: str | Path | Checkpoint,
    kind: str,
    *,
    density: float | None = None,
    seed: int = 0,
    dtype: str | None = None,
    rank: int | None = None,
    scope: str = "tensor",
    reach: float | None = None,
    progress: bool = False,
) -> SubnetMask:
    """Choose weights of a model by what they are before any training.

    Memory is bounded by a few times the largest tensor.

    Args:
        checkpoint: The base: a folder, a Hub id, a GGUF or an open `Checkpoint`.
        kind: `low_magnitude`: the smallest |w| of every tensor. `predicted`: the weights that change their stored value
            first when a float32 master drifts, by one threshold for the whole model (`subnet_ft.masks.spacing`).
            `principal`, `non_principal`: of every tensor the largest or smallest entries of an approximation of low
            rank (`subnet_ft.masks.low_rank`). `uniform`: any weight is as likely as any other.
        density: Share of the weights to choose, in (0, 1]: of every tensor, rounded to whole weights; of the whole
            model for `predicted` and for a global `uniform`.
        seed: Of `uniform`; of the other kinds it decides which of equal weights are taken.
        dtype: The dtype in which the weights are trained, where they are stored in another one.
        rank: Of the approximation; `None`: 1/32 of the smaller side of a matrix.
        scope: Of `uniform`: `tensor`, the same density in every tensor; `global`, one draw from all weights.
        reach: Of `predicted`, instead of a density: the drift of a master that is expected, in units of the weights.
            Chosen is whatever it would change; the density follows.
        progress: Show a progress bar on standard error.

    Raises:
        MaskError: `kind` or a parameter is unknown, out of range or not one of this kind.
        CheckpointError: The checkpoint cannot be found or read.
    """
    source = _source(kind, density, seed, rank, scope, reach)
    if dtype is not None and dtype not in COMPARE_DTYPES:
        raise MaskError(f"`dtype` must be one of {', '.join(COMPARE_DTYPES)}, got {dtype!r}.")
    base = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    read = _Reader(base, dtype, progress=progress)
    if kind == "predicted":
        tensors = _predicted(read, density, reach, seed)
    elif kind == "uniform" and scope == "global":
        assert density is not None
        for _ in read.tensors():  # only the record needs the weights
            pass
        tensors = _uniform(read.shapes, _count(density, read.num_parameters), seed)
    else:
        assert density is not None
        tensors = {}
        for name, weight in read.tensors():
            count = _count(density, weight.numel())
            if kind == "uniform":
                tensors |= _uniform({name: tuple(weight.shape)}, count, seed)
            else:
                tensors[name] = ranked(kind, name, weight, count, seed=seed, rank=rank)
    return SubnetMask(tensors, Provenance(base=read.record, compare_dtype=dtype, source=source))


class _Reader:
    """The weights of a checkpoint in the dtype of training, and the record of them.

    Invariant: `record` is whole as soon as the weights have been read once.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str | None, *, progress: bool) -> None:
        self.checkpoint = checkpoint
        self.progress = progress
        self._cast = None if dtype is None else getattr(torch, dtype)
        self.dtypes = {name: self._cast or spec.dtype for name, spec in checkpoint.specs.items()}
        self.shapes = {name: tuple(spec.shape) for name, spec in checkpoint.specs.items()}
        self.num_parameters = sum(math.prod(shape) for shape in self.shapes.values())
        self.record = ModelRecord(checkpoint.name, checkpoint.revision)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor once."""
        with _progress_bar(self.num_parameters, enabled=self.progress) as bar:
            for name, stored in self.checkpoint.tensors():
                weight = stored.to(self.dtypes[name])
                del stored
                if name not in self.record.fingerprints:
                    self.record.dtypes[name] = str(weight.dtype).removeprefix("torch.")
                    self.record.fingerprints[name] = format_fingerprint(subnet_kernels.fingerprint(weight))
                yield name, weight
                bar.update(weight.numel())


def _predicted(read: _Reader, density: float | None, reach: float | None, seed: int) -> dict[str, TensorMask]:
    def pieces() -> KeyPieces:
        for name, weight in read.tensors():
            flat = weight.reshape(-1)
            for tile in tiles(flat.numel()):
                yield name, reach_keys(flat[tile])

    def count(histogram: np.ndarray) -> int:
        within = np.cumsum(histogram)
        if density is None:
            assert reach is not None
            return sum(int(number) for key, number in enumerate(histogram) if reach_of(key) <= reach)
        wanted = _count(density, read.num_parameters)
        last = int(np.searchsorted(within, wanted))
        logger.info(
            "predicted: a drift of less than %.3g changes %d weights, %.3g itself %d more, of which %d are chosen",
            reach_of(last), within[last] - histogram[last], reach_of(last), histogram[last],
            wanted - within[last] + histogram[last],
        )  # fmt: skip
        return wanted

    return lowest_overall(pieces, read.shapes, count, num_keys=NUM_REACHES, seed=seed, purpose="predicted")


def _uniform(shapes: Mapping[str, tuple[int, ...]], count: int, seed: int) -> dict[str, TensorMask]:
    return lowest_overall(partial(_no_keys, shapes), shapes, count, num_keys=1, seed=seed, purpose="uniform")


def _no_keys(shapes: Mapping[str, tuple[int, ...]]) -> KeyPieces:
    for name, shape in shapes.items():
        for tile in tiles(math.prod(shape)):
            yield name, np.zeros(tile.stop - tile.start, dtype=np.int32)


def _count(density: float, num_elements: int) -> int:
    return round(density * num_elements)


def _source(
    kind: str, density: float | None, seed: int, rank: int | None, scope: str, reach: float | None
) -> dict[str, Any]:
    """Check the parameters of a kind, and return what the mask's source says about them."""
    if kind not in BASE_KINDS:
        raise MaskError(f"`{kind}` is not a mask of base weights; choose one of {', '.join(BASE_KINDS)}.")
    if seed < 0:
        raise MaskError(f"`seed` must be >= 0, got {seed}.")
    if scope not in SCOPES or (scope != "tensor" and kind != "uniform"):
        expected = f"one of {', '.join(SCOPES)}" if kind == "uniform" else f"`tensor` for `{kind}`"
        raise MaskError(f"`scope` must be {expected}, got {scope!r}.")
    source = {"kind": kind, "seed": seed, **rank_source(kind, rank)}
    if kind == "uniform":
        source["scope"] = scope
    if reach is not None:
        if kind != "predicted" or density is not None:
            raise MaskError(f"`reach` is for `predicted`, instead of a density; got it with `{kind}`, {density=}.")
        if not reach > 0:
            raise MaskError(f"`reach` must be > 0, got {reach!r}.")
        return {**source, "reach": reach}
    if density is None or not 0 < density <= 1:
        raise MaskError(f"`density` must be in (0, 1] for a mask of kind `{kind}`, got {density!r}.")
    return {**source, "density": density}


def _progress_bar(total: int, *, enabled: bool) -> tqdm[NoReturn]:
    from tqdm import tqdm

    return tqdm(total=total, desc="Reading weights", unit="weight", unit_scale=True, disable=not enabled)
