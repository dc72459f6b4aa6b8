"""Control masks: as many weights as the subnetwork in every tensor, chosen without knowing which ones RL changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

import subnet_kernels
from subnet_ft.errors import MaskError, MaskMismatchError
from subnet_ft.masks.draws import drawn_like, drawn_outside
from subnet_ft.masks.layer_permutation import layer_permuted
from subnet_ft.masks.low_rank import RANK_SHARE, low_rank_magnitudes
from subnet_ft.masks.mask import SubnetMask, TensorMask
from subnet_ft.masks.provenance import Provenance
from subnet_ft.masks.selection import generator_of, lowest, magnitude_keys

CONTROLS = (
    "uniform",
    "magnitude_matched",
    "inverted",
    "layer_permuted",
    "low_magnitude",
    "principal",
    "non_principal",
)
WEIGHED = ("magnitude_matched", "low_magnitude", "principal", "non_principal")
"""Controls that look at the base's weights."""


def control_mask(
    mask: SubnetMask,
    kind: str,
    *,
    seed: int,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
    rank: int | None = None,
) -> SubnetMask:
    """Make a mask of the same size as `mask` that does not know which weights were trained.

    Every kind has the count of every tensor, `layer_permuted` that of every matrix kind over its layers.

    Args:
        mask: The subnetwork to match.
        kind: `uniform`: any weight of the tensor is as likely as any other. `magnitude_matched`: the same count in
            every bin of |w| (float32 exponent and three leading mantissa bits), uniform inside a bin; bf16 rounding
            lets small weights change in every run, so this is the harder and the fairer control. `inverted`: uniform
            among the weights outside the mask. `layer_permuted`: the mask that the same kind of tensor has in another
            decoder layer; tensors outside the layers are drawn uniformly. `low_magnitude`: the smallest |w|.
            `principal`, `non_principal`: the largest and the smallest entries of an approximation of low rank.
        seed: Of whatever is drawn, with each tensor's name; the same seed gives the same mask. Of the kinds that rank
            weights it decides which of equal ones are taken.
        weights: The base model's tensors by name, for the kinds that look at them; cast to the dtype that the mask was
            compared in.
        rank: Of the approximation; `None`: 1/32 of the smaller side of a matrix.

    Raises:
        MaskError: `kind` is unknown, the weights it needs are missing, or the mask has no control of this kind: a
            tensor that is more than half dense has no inverse, layers of different shapes no permutation.
        MaskMismatchError: The weights are not those of the mask's tensors.
    """
    if kind not in CONTROLS:
        raise MaskError(f"`{kind}` is not a control; choose one of {', '.join(CONTROLS)}.")
    if kind in WEIGHED and weights is None:
        raise MaskError(f"A control of kind `{kind}` needs the base model's weights.")
    source: dict[str, Any] = {"kind": kind, "seed": seed, "of": mask.fingerprint, **rank_source(kind, rank)}
    origin = mask.provenance
    provenance = Provenance(base=origin.base, compare_dtype=origin.compare_dtype, source=source)
    if kind in WEIGHED:
        assert weights is not None
        tensors = {
            name: drawn_like(mask.tensors[name], name, seed, weight)
            if kind == "magnitude_matched"
            else ranked(kind, name, weight, mask.tensors[name].count, seed=seed, rank=rank)
            for name, weight in _of_mask(mask, weights)
        }
        tensors = {name: tensors[name] for name in mask.tensors}
    elif kind == "layer_permuted":
        tensors = layer_permuted(mask, seed)
    else:
        draw = drawn_like if kind == "uniform" else drawn_outside
        tensors = {name: draw(tensor, name, seed) for name, tensor in mask.tensors.items()}
    return SubnetMask(tensors, provenance)


def ranked(kind: str, name: str, weight: torch.Tensor, count: int, *, seed: int, rank: int | None) -> TensorMask:
    """Choose the first `count` weights of a tensor by magnitude or by what an approximation of low rank says.

    Args:
        kind: `low_magnitude`, `principal` or `non_principal`.
        name: Of the tensor.
        weight: Its weights, any shape.
        count: How many to choose.
        seed: Decides which of equal ones are taken.
        rank: Of the approximation.
    """
    score = weight if kind == "low_magnitude" else low_rank_magnitudes(name, weight, rank)
    keys = magnitude_keys(score, largest_first=kind == "principal")
    del score
    chosen = lowest(keys, count, generator_of(seed, f"{kind} {name}"))
    return TensorMask.build(subnet_kernels.pack_bits(chosen), tuple(weight.shape))


def rank_source(kind: str, rank: int | None) -> dict[str, Any]:
    """Return what a mask's source says about the rank.

    Raises:
        MaskError: There is a rank for a kind that has none, or one below 1.
    """
    if kind in ("principal", "non_principal"):
        if rank is not None and rank < 1:
            raise MaskError(f"`rank` must be >= 1, got {rank}.")
        return {"rank_share": RANK_SHARE} if rank is None else {"rank": rank}
    if rank is not None:
        raise MaskError(f"A mask of kind `{kind}` has no `rank`; only `principal` and `non_principal` have one.")
    return {}


def _of_mask(mask: SubnetMask, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Check that the weights are of the mask's tensors, each once, and cast them as the mask was compared."""
    dtype = mask.provenance.compare_dtype
    seen = set()
    for name, weight in weights:
        if name not in mask.tensors or tuple(weight.shape) != mask.tensors[name].shape:
            expected = f"of shape {mask.tensors[name].shape}" if name in mask.tensors else "not in the mask"
            raise MaskMismatchError(
                f"The weights of `{name}` have shape {tuple(weight.shape)}, but the tensor is {expected}. Pass the "
                "tensors of the mask's own base."
            )
        seen.add(name)
        yield name, weight if dtype is None else weight.to(getattr(torch, dtype))
    missing = [name for name in mask.tensors if name not in seen]
    if missing:
        raise MaskError(f"No weights were given for `{missing[0]}` ({len(missing)} tensors in all).")
