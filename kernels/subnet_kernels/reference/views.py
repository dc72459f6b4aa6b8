"""The bits of a tensor as integers, which compare and mix exactly whatever the dtype."""

from __future__ import annotations

import torch

_BIT_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_view(tensor: torch.Tensor) -> torch.Tensor:
    """View the bits of a tensor as integers of the same width; the shape stays.

    Args:
        tensor: Any shape, 1-, 2-, 4- or 8-byte dtype. Read only; copied if it is not contiguous.

    Returns:
        uint8, int16, int32 or int64.

    Example:
        float32 [1.0, -0.0] gives int32 [0x3F800000, -0x80000000].
    """
    return tensor.detach().contiguous().view(_BIT_TYPES[tensor.element_size()])
