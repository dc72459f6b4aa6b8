"""Parameter names without what wrappers put into them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from subnet_ft.errors import MaskError

_WRAPPER_PARTS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

Value = TypeVar("Value")


def canonical_name(name: str) -> str:
    """Strip what DDP, `torch.compile`, FSDP and activation checkpointing put into a parameter's name.

    Example:
        `module._orig_mod.model.norm.weight` becomes `model.norm.weight`.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def by_canonical_name(named: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """Key what belongs to parameters by their canonical names, in the given order.

    Raises:
        MaskError: Two names have one canonical name.
    """
    found: dict[str, Value] = {}
    written: dict[str, str] = {}
    for name, value in named:
        canonical = canonical_name(name)
        if canonical in found:
            raise MaskError(
                f"`{written[canonical]}` and `{name}` both become `{canonical}` without the parts that wrappers add "
                f"({', '.join(_WRAPPER_PARTS)}), so a mask cannot tell them apart. Rename the module that is called "
                "like a wrapper, or pass every parameter once."
            )
        found[canonical], written[canonical] = value, name
    return found
