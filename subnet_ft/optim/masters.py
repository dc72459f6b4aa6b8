"""How float32 masters are kept beside weights of a lower precision."""

from __future__ import annotations

import torch

import subnet_kernels
from subnet_ft.optim.shards import local, local_flat
from subnet_kernels import BitMask

MASTERS = ("fp32", "remainder", "stochastic", "none")
"""`fp32`: 4 bytes per trainable weight. `remainder`: for bfloat16 weights the low 16 bits of the master beside the
weight, an exact float32 master for 2 bytes. `stochastic`: none; bfloat16 weights are rounded up or down at random so
that the mean is exact. `none`: bfloat16 weights are rounded to nearest, and what is below their spacing is forgotten
after every step, as in training without masters: for studies of what that loses. It saves no memory. float32 weights
are their own masters, and float16 ones always have `fp32` masters."""


def check_master(master: str) -> None:
    """Raise ValueError for an unknown kind of master."""
    if master not in MASTERS:
        raise ValueError(f"`master` must be one of {', '.join(MASTERS)}, got {master!r}")


def master_dtype(weight_dtype: torch.dtype, master: str) -> torch.dtype | None:
    """Return the dtype of the masters beside weights of a dtype, or `None` where there are none."""
    if weight_dtype == torch.float32:
        return None
    if weight_dtype == torch.bfloat16 and master != "fp32":
        return None if master == "stochastic" else torch.int16
    return torch.float32


def new_masters(weight: torch.Tensor, mask: BitMask, master: str) -> torch.Tensor | None:
    """Return the (K,) masters of (N,) weights that no update has changed yet."""
    dtype = master_dtype(weight.dtype, master)
    if dtype == torch.int16:
        return torch.zeros(mask.count, dtype=torch.int16, device=weight.device)
    return None if dtype is None else subnet_kernels.gather(weight, mask)


def forget_remainder(master: torch.Tensor | None) -> None:
    """Make the rounded weights their own masters again: zero the (K,) remainders beside them, where there are any."""
    if master is not None and master.dtype == torch.int16:
        master.zero_()


class Roundings:
    """Which weights nobody wrote to since their masters were rounded into them, as far as torch can tell."""

    def __init__(self) -> None:
        self._written: dict[int, tuple[int, ...]] = {}

    def mark(self, parameter: torch.nn.Parameter, master: torch.Tensor | None) -> None:
        """Remember that a parameter (N,) now is the rounding of its masters (K,)."""
        self._written[id(parameter)] = _versions(parameter, master)

    def has(self, parameter: torch.nn.Parameter, master: torch.Tensor | None) -> bool:
        """Whether a parameter still is the rounding of its masters."""
        return self._written.get(id(parameter)) == _versions(parameter, master)

    def was_written(self, parameter: torch.nn.Parameter, master: torch.Tensor | None, mask: BitMask) -> bool:
        """Whether a parameter is not the rounding of its masters; where nobody marked it, the values tell.

        A remainder completes whatever weight it stands beside, so that it is never wrong by itself.
        """
        if id(parameter) in self._written:
            return not self.has(parameter, master)
        if master is None or not master.is_floating_point():
            return False
        weights = subnet_kernels.gather(local_flat(parameter), mask)
        return not torch.equal(subnet_kernels.round_to_weights(master, parameter.dtype).to(weights.dtype), weights)

    def clear(self) -> None:
        """Forget everything, because masters were replaced."""
        self._written.clear()


def _versions(parameter: torch.nn.Parameter, master: torch.Tensor | None) -> tuple[int, ...]:
    """Return numbers that change when torch writes to a parameter or its masters, or gives it another storage."""
    held = local(parameter)
    written = (held._version, held.data_ptr())
    return written if master is None else (*written, master._version, master.data_ptr())
