"""Extraction: which weights differ between two checkpoints, streaming over both."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

import subnet_kernels
from subnet_ft.checkpoints import Checkpoint, TensorSpec, open_checkpoint
from subnet_ft.checkpoints.listing import listing
from subnet_ft.errors import CheckpointMismatchError, MaskError
from subnet_ft.masks.mask import SubnetMask, TensorMask
from subnet_ft.masks.provenance import (
    COMPARE_DTYPES,
    ModelRecord,
    Provenance,
    format_fingerprint,
    narrowest_dtype,
)

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

CURVE_TOLERANCES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)

# Elements per piece: a multiple of 8, so that pieces meet at a byte of the mask. Both pieces stay in the cache.
_CHUNK = 1 << 20


def extract(
    base: str | Path | Checkpoint,
    tuned: str | Path | Checkpoint,
    *,
    criterion: str = "exact",
    tolerance: float = 0.0,
    dtype: str | None = None,
    progress: bool = False,
) -> SubnetMask:
    """Mark every weight that differs between two checkpoints of one model: the subnetwork that training changed.

    Both checkpoints are read and compared piece by piece; neither is ever whole in memory.

    Args:
        base: The checkpoint before training: a folder, a Hub id, a GGUF or an open `Checkpoint`.
        tuned: The checkpoint after training.
        criterion: `exact`: the stored bits differ. `absolute`: |tuned - base| > tolerance. `relative`: |tuned - base| >
            tolerance * |base|. Differences are taken in float32; a NaN on one side only is a change.
        tolerance: >= 0; only `absolute` and `relative` have one.
        dtype: Cast both to `bfloat16`, `float16` or `float32` before the comparison. The mask then belongs to the base
            in that dtype: its recorded dtypes and fingerprints are those of the cast weights.
        progress: Show a progress bar on standard error.

    Returns:
        The mask. Its provenance holds both models' fingerprints and the density at several tolerances.

    Raises:
        MaskError: `criterion`, `tolerance` or `dtype` is invalid.
        CheckpointError: A checkpoint cannot be found or read.
        CheckpointMismatchError: The two have different tensors or shapes, or different dtypes and `dtype` is `None`.

    Source: Mukherjee et al. 2025 (arXiv 2505.11711); their training mask is `exact`, their reported update sparsity
    `absolute` with 1e-5.
    """
    _check_arguments(criterion, tolerance, dtype)
    before = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    after = tuned if isinstance(tuned, Checkpoint) else open_checkpoint(tuned)
    _check_comparable(before, after, dtype)

    num_parameters = sum(math.prod(spec.shape) for spec in before.specs.values())
    comparison = _Comparison(criterion, tolerance, None if dtype is None else getattr(torch, dtype))
    tensors: dict[str, TensorMask] = {}
    with _progress_bar(num_parameters, enabled=progress) as bar:
        for (name, old), (_, new) in zip(before.pieces(_CHUNK), after.pieces(_CHUNK, before.specs), strict=True):
            pairs = _watched(zip(old, new, strict=True), bar)
            tensors[name] = comparison.compare(name, before.specs[name].shape, pairs)

    densities = [count / max(num_parameters, 1) for count in comparison.counts]
    mask = SubnetMask(
        tensors,
        Provenance(
            base=_record(before, comparison.base_fingerprints, dtype),
            tuned=_record(after, comparison.tuned_fingerprints, dtype),
            criterion=criterion,
            tolerance=tolerance,
            compare_dtype=dtype,
            source={"kind": "extract"},
            density_by_tolerance={f"{t:g}": d for t, d in zip((0.0, *CURVE_TOLERANCES), densities, strict=True)},
        ),
    )
    _warn_of_extremes(mask, before)
    return mask


class _Comparison:
    """One criterion over many tensors, and the sums that come out of the same pass.

    Invariant: temporaries have the size of a piece, whatever the size of a tensor.
    """

    def __init__(self, criterion: str, tolerance: float, dtype: torch.dtype | None) -> None:
        self.criterion = criterion
        self.tolerance = tolerance
        self.dtype = dtype
        self.counts = [0] * (1 + len(CURVE_TOLERANCES))  # changed weights: exactly, then beyond each tolerance
        self.base_fingerprints: dict[str, str] = {}
        self.tuned_fingerprints: dict[str, str] = {}

    def compare(
        self, name: str, shape: tuple[int, ...], pieces: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> TensorMask:
        """Return the mask of one parameter, given as pairs of flat pieces: of the base and of the tuned weights."""
        bits = np.zeros((math.prod(shape) + 7) // 8, dtype=np.uint8)
        start, count = 0, 0
        base_sums, tuned_sums = (0, 0), (0, 0)
        for old, new in pieces:
            if self.dtype is not None:
                old, new = old.to(self.dtype), new.to(self.dtype)
            found = subnet_kernels.compare(old, new, offset=start, tolerances=CURVE_TOLERANCES)
            self.counts = [sum(pair) for pair in zip(self.counts, (found.count, *found.beyond), strict=True)]
            base_sums = _added(base_sums, found.base_fingerprint)
            tuned_sums = _added(tuned_sums, found.tuned_fingerprint)
            marked, marked_count = self._marked(old, new, found)
            if marked_count:
                # By numpy: the threads of a copy in torch spin for a while afterwards and slow the next comparison.
                bits[start // 8 : start // 8 + marked.numel()] = marked.numpy()
                count += marked_count
            start += old.numel()
        self.base_fingerprints[name] = format_fingerprint(base_sums)
        self.tuned_fingerprints[name] = format_fingerprint(tuned_sums)
        return TensorMask(torch.from_numpy(bits if count else bits[:0].copy()), shape, count)

    def _marked(
        self, old: torch.Tensor, new: torch.Tensor, found: subnet_kernels.Comparison
    ) -> tuple[torch.Tensor, int]:
        """Return the bits by the criterion, and their count."""
        if self.criterion == "exact" or found.count == 0:
            return found.bits, found.count
        return subnet_kernels.changed_bits(old, new, criterion=self.criterion, tolerance=self.tolerance)


def _added(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
    """Add two fingerprints of parts of one tensor."""
    return (left[0] + right[0]) % 2**64, (left[1] + right[1]) % 2**64


def _check_arguments(criterion: str, tolerance: float, dtype: str | None) -> None:
    if criterion not in subnet_kernels.CRITERIA:
        raise MaskError(f"`criterion` must be one of {', '.join(subnet_kernels.CRITERIA)}, got {criterion!r}.")
    if not (tolerance >= 0.0 and math.isfinite(tolerance)):
        raise MaskError(f"`tolerance` must be a finite number >= 0, got {tolerance!r}.")
    if criterion == "exact" and tolerance != 0.0:
        raise MaskError(
            f"The criterion `exact` compares bits and has no tolerance, got {tolerance!r}. Choose `absolute` or "
            "`relative`, or leave the tolerance out."
        )
    if dtype is not None and dtype not in COMPARE_DTYPES:
        raise MaskError(f"`dtype` must be one of {', '.join(COMPARE_DTYPES)}, got {dtype!r}.")


def _check_comparable(base: Checkpoint, tuned: Checkpoint, dtype: str | None) -> None:
    between = f"`{base.name}` and `{tuned.name}`"
    only_base = [name for name in base.specs if name not in tuned.specs]
    only_tuned = [name for name in tuned.specs if name not in base.specs]
    if only_base or only_tuned:
        raise CheckpointMismatchError(
            f"{between} have different parameters: {listing(only_base)} only in the base, "
            f"{listing(only_tuned)} only in the tuned checkpoint. Compare two checkpoints of one model, saved whole "
            "and with the same tied embeddings."
        )
    resized = _differing(base, tuned, lambda spec: str(spec.shape))
    if resized:
        raise CheckpointMismatchError(
            f"{between} have parameters of different shapes, base against tuned: {listing(resized)}. A subnetwork "
            "needs equal shapes: resize the base's embeddings to the tuned vocabulary first, or compare with the right "
            "base."
        )
    recast = _differing(base, tuned, lambda spec: str(spec.dtype).removeprefix("torch."))
    if recast and dtype is None:
        mixed = [name for name, spec in base.specs.items() if spec.dtype != tuned.specs[name].dtype]
        wanted = narrowest_dtype(side.specs[name].dtype for side in (tuned, base) for name in mixed)
        raise CheckpointMismatchError(
            f"{between} are stored in different dtypes, base against tuned: {listing(recast)}. Rounding alone would "
            f"look like training. Cast both before comparing with dtype='{wanted}' (`--dtype {wanted}`)."
        )


def _differing(base: Checkpoint, tuned: Checkpoint, show: Callable[[TensorSpec], str]) -> list[str]:
    pairs = ((name, show(spec), show(tuned.specs[name])) for name, spec in base.specs.items())
    return [f"`{name}` {before} and {after}" for name, before, after in pairs if before != after]


def _record(checkpoint: Checkpoint, fingerprints: dict[str, str], dtype: str | None) -> ModelRecord:
    dtypes = {name: dtype or str(spec.dtype).removeprefix("torch.") for name, spec in checkpoint.specs.items()}
    return ModelRecord(checkpoint.name, checkpoint.revision, dtypes, fingerprints)


def _warn_of_extremes(mask: SubnetMask, base: Checkpoint) -> None:
    if mask.num_trainable == 0:
        logger.warning("No weight differs by this criterion: the mask is empty and nothing can be trained with it.")
    elif mask.density > 0.9 and any(spec.dtype == torch.float32 for spec in base.specs.values()):
        logger.warning(
            "%.1f %% of the weights differ. In float32 nearly every optimizer step changes nearly every weight; train "
            "in bfloat16 or compare with a tolerance to find a subnetwork.",
            100 * mask.density,
        )


def _watched(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], bar: tqdm[NoReturn]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pass pairs of pieces on and count them: one tensor may take most of the time."""
    for pair in pairs:
        yield pair
        bar.update(pair[0].numel())


def _progress_bar(total: int, *, enabled: bool) -> tqdm[NoReturn]:
    from tqdm import tqdm

    return tqdm(total=total, desc="Comparing weights", unit="weight", unit_scale=True, disable=not enabled)
