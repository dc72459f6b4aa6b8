"""How kernels are declared and started."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton

from subnet_kernels.layout import TILE_SIZE, BitMask

VECTOR_LANES = 128
"""Threads of a program that touches every element of a tile: eight elements each, 16 bytes of a 16-bit dtype."""

_TILE_BYTES = TILE_SIZE // 8

# Where Triton fuses multiplications with additions, results differ from the reference in the last place.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


def kernel(function: Callable[..., Any]) -> Any:
    """Declare a function that runs on the GPU, or in Triton's interpreter if TRITON_INTERPRET=1 is set by then."""
    return triton.jit(function)


def kernel_of_tiles(function: Callable[..., Any]) -> Any:
    """Declare a kernel over whole tiles; it is not compiled anew for integers that are 1 or multiples of 16."""
    return triton.jit(function, do_not_specialize=[name for name in _arguments(function) if not name.endswith("_ptr")])


def kernel_of_slots(function: Callable[..., Any]) -> Any:
    """Declare a kernel over slots; it is not compiled anew for the alignment of an address either.

    Slots begin anywhere, so no access is wider than a value. Words of a mask that were loaded four at a time would have
    to be handed from lane to lane through shared memory.
    """
    return triton.jit(function, do_not_specialize=_arguments(function))


def _arguments(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name.islower()]  # constants are upper case


def num_warps(is_slotwise: bool, lanes_per_warp: int) -> int:
    """Return the warps of a program: one where lanes are slots, so that its work before the first slot is done once."""
    return 1 if is_slotwise else VECTOR_LANES // lanes_per_warp


def launch(
    function: Any, num_programs: int, *arguments: Any, device: torch.device, is_slotwise: bool, **constants: Any
) -> None:
    """Start `num_programs` programs of a kernel on the current stream of `device`.

    Args:
        function: What `kernel` returned.
        num_programs: >= 0; nothing is started for 0.
        arguments: The kernel's arguments before its constants.
        device: Where its tensors lie.
        is_slotwise: Its lanes are the slots of a tile, not its elements.
        constants: The kernel's `constexpr` arguments.
    """
    if num_programs == 0:
        return
    warps = num_warps(is_slotwise, 64 if torch.version.hip else 32)
    # The interpreter computes with numpy, which would warn of infinities and NaN where a GPU is silent.
    with torch.cuda.device(device) if device.type == "cuda" else np.errstate(all="ignore"):
        function[(num_programs,)](*arguments, **constants, num_warps=warps, **OPTIONS)


def whole_tiles(mask: BitMask) -> torch.Tensor:
    """Return the bits of a mask, padded with zeros to whole tiles: kernels load them without a bound."""
    missing = -mask.bits.numel() % _TILE_BYTES
    return torch.nn.functional.pad(mask.bits, (0, missing)) if missing else mask.bits
