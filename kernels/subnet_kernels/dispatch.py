"""The one place that decides which implementation of an op runs.

Every op has a plain-torch reference that defines it. Faster implementations register beside it; `choose` names the one
that runs for a device and why, and a failure inside it is an error, never a fall back to another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from subnet_kernels import reference

_REFERENCE: dict[str, Callable[..., Any]] = {
    "changed_bits": reference.changed_bits,
    "count_bits": reference.count_bits,
    "fingerprint": reference.fingerprint,
    "gather": reference.gather,
    "masked_adamw": reference.masked_adamw,
    "pack_bits": reference.pack_bits,
    "scatter": reference.scatter,
    "unpack_bits": reference.unpack_bits,
}


@dataclass(frozen=True)
class Choice:
    """An implementation and the reason it was chosen."""

    function: Callable[..., Any]
    backend: str
    reason: str


def choose(op: str, device: torch.device) -> Choice:
    """Return the implementation of `op` that runs on `device`.

    Raises:
        KeyError: `op` is not an op of this package.
    """
    if op not in _REFERENCE:
        raise KeyError(f"`{op}` is not an op; there are {', '.join(sorted(_REFERENCE))}")
    return Choice(_REFERENCE[op], "reference", f"the plain-torch reference is the only implementation on {device.type}")


def backends(device: torch.device) -> dict[str, str]:
    """Return the backend that `choose` picks on `device`, for every op."""
    return {op: choose(op, device).backend for op in sorted(_REFERENCE)}
