"""Finding the masked optimizer inside what trainers make of it."""

from __future__ import annotations

from typing import Any

from subnet_ft.errors import TrainerError
from subnet_ft.optim import MaskedBase


def unwrapped(optimizer: Any) -> MaskedBase:
    """Return the masked optimizer inside accelerate's wrapper, or itself.

    Raises:
        TrainerError: There is none.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, MaskedBase):
        raise TrainerError(
            f"The trainer's optimizer is {type(inner).__name__}, not a masked one. Call `restrict` on the trainer, or "
            "give it a MaskedAdamW."
        )
    return inner
