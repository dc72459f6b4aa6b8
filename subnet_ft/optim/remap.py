"""Another mask in the middle of training: which one may follow, and compact values under it."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch

import subnet_kernels
from subnet_ft.errors import GradientError, MaskMismatchError
from subnet_ft.masks import SubnetMask
from subnet_ft.optim.gradients import num_processes
from subnet_kernels import BitMask

# Weights at a time: what is unpacked to booleans stays small whatever the size of the tensor.
_CHUNK = 1 << 22


def check_successor(
    old: SubnetMask,
    new: SubnetMask,
    parameters: Mapping[str, torch.nn.Parameter],
    *,
    untouched: Container[str],
    compact_grads: bool,
) -> None:
    """Check that a mask may follow another on a model in training; names and shapes were checked before.

    Weights that were trained are not those of the base any more, so the base is compared where none were, and by what
    the two masks record.

    Raises:
        MaskMismatchError: The new mask was made for another base.
        GradientError: A tensor starts to train that DDP took for frozen.
    """
    before, after = old.provenance.base, new.provenance.base
    for name, dtype in ({} if after is None else after.dtypes).items():
        found = str(parameters[name].dtype).removeprefix("torch.") if name in parameters else dtype
        if found != dtype:
            raise MaskMismatchError(f"`{name}` is {found} but the new mask was compared in {dtype}.")
    if before is not None and after is not None:
        for name, fingerprint in before.fingerprints.items():
            if after.fingerprints.get(name, fingerprint) != fingerprint:
                raise MaskMismatchError(
                    f"The new mask was made for another base: `{name}` has fingerprint {fingerprint} in the base of "
                    f"the old mask ({before.name}) and {after.fingerprints[name]} in that of the new one "
                    f"({after.name}). Take masks of one base."
                )
    new.check_weights((name, p.detach()) for name, p in parameters.items() if name in untouched)
    entering = [name for name in parameters if new.tensors[name].count and not old.tensors[name].count]
    if entering and not compact_grads and num_processes() > 1:
        raise GradientError(
            f"`{entering[0]}` had no trainable weight so far, and DDP decides when it wraps a model which gradients "
            "it reduces, so the processes would part ways. Start with a mask that trains something in it."
        )


def remap(values: torch.Tensor, old: BitMask, new: BitMask, into: torch.Tensor) -> torch.Tensor:
    """Overwrite `into` by the values of the weights that both masks hold.

    Args:
        values: (K_old,) compact under `old`. In.
        old: Mask of the same tensor, N weights.
        new: Mask of the same tensor, N weights.
        into: (K_new,) compact under `new`, with what the new weights start from. In-out.

    Returns:
        `into`.

    Example:
        Under [1, 1, 0] the values [5, 6], under [0, 1, 1] into [0, 0]: [6, 0].
    """
    read = written = 0
    for start in range(0, old.num_elements, _CHUNK):
        count = min(_CHUNK, old.num_elements - start)
        before, after = _dense(old, start, count), _dense(new, start, count)
        both = before & after
        num_before, num_after = int(before.sum()), int(after.sum())
        kept = values[read : read + num_before][both[before]]
        into[written : written + num_after][both[after]] = kept
        read, written = read + num_before, written + num_after
    return into


def _dense(mask: BitMask, start: int, count: int) -> torch.Tensor:
    """Return (count,) bool, the mask from element `start` on; `start` is a multiple of 8."""
    return subnet_kernels.unpack_bits(mask.bits[start // 8 : (start + count + 7) // 8], count)
