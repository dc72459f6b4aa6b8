"""The bytes that live from one step to the next, counted: what `subnet_ft.optim.memory_ledger` counts in a run."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from subnet_ft.optim.masters import master_dtype
from subnet_ft.plan.trained import PlannedTensor, Trained
from subnet_kernels.layout import SEGMENT_TILES, TILE_SIZE

if TYPE_CHECKING:
    from subnet_ft.recipe.schema import OptimizerSpec

_STEP_TABLE = 8  # bytes per tile that a kernel on a GPU keeps of the masks (kernels/README.md, "Few launches")
_STEP_ROW = 32  # bytes per tensor that one on the CPU keeps, and as many more wherever threads share a tensor
# Of bitsandbytes' 8-bit moments: weights per scale, the smallest tensor that has them, two tables of 256 levels.
_BLOCK, _SMALLEST, _LEVELS = 256, 4096, 2 * 256 * 4


def ledger(
    tensors: Iterable[PlannedTensor], optimizer: OptimizerSpec, *, device: str, master: str | None = None
) -> dict[str, int]:
    """Count what a rank holds of weights, gradients, moments, masters and masks.

    Args:
        tensors: What it holds of every parameter.
        optimizer: The recipe's.
        device: `cuda` or `cpu`: masks are padded on a GPU, and its kernels keep a table of them.
        master: Another kind of masters than the recipe's.
    """
    kind = "fp32" if optimizer.name == "adamw_8bit" else master or optimizer.master
    held = list(tensors)
    trained = [tensor for tensor in held if tensor.count]
    return {
        "weights": sum(tensor.nbytes for tensor in held),
        "gradients": sum(4 * tensor.count for tensor in trained),
        "moments": _moments(trained, optimizer.name),
        "masters": sum(_master_bytes(tensor, kind) for tensor in trained),
        "mask": sum(mask_bytes(tensor.num_elements, device=device) for tensor in trained)
        # Optimizers that we wrap have no kernel of ours.
        + (0 if optimizer.name == "adamw_8bit" else sum(_table(tensor, device) for tensor in trained)),
    }


def mask_bytes(num_elements: int, *, device: str) -> int:
    """Count the bytes of a tensor's mask: a bit per weight, 4 bytes per tile of 1,024, 8 per segment of 2**30."""
    tiles = -(-num_elements // TILE_SIZE)
    bits = -(-num_elements // 8)
    if device == "cuda":
        bits = tiles * TILE_SIZE // 8
    return bits + 4 * tiles + 8 * max(1, -(-tiles // SEGMENT_TILES))


def reference_bytes(
    trained: Trained,
    tensors: Iterable[PlannedTensor],
    *,
    source: str,
    quantization: str | None,
    linears: Collection[str],
    device: str,
) -> int:
    """Count the bytes of a frozen copy of the base, which a method with an adapter needs none of.

    Args:
        trained: The policy.
        tensors: What a rank holds of it.
        source: `model`: a second model; `policy`: the base's values on the mask, in runs that leave weights out.
        quantization: How a second model is held: `int8`, `nf4` or `None`.
        linears: The weights that are quantized then.
        device: As in `ledger`.
    """
    if trained.method not in ("full", "subnet"):
        return 0
    if source == "policy" and trained.method == "subnet":
        of_mask = [tensor for tensor in tensors if tensor.count]
        values = sum(tensor.count * tensor.dtype.itemsize for tensor in of_mask)
        return values + sum(mask_bytes(tensor.num_elements, device=device) for tensor in of_mask)
    return sum(_held(tensor, quantization if tensor.name in linears else None) for tensor in tensors)


def _table(tensor: PlannedTensor, device: str) -> int:
    """Count the bytes that a step's kernel keeps of a mask."""
    return _STEP_TABLE * -(-tensor.num_elements // TILE_SIZE) if device == "cuda" else _STEP_ROW


def _held(tensor: PlannedTensor, quantization: str | None) -> int:
    """Count the bytes of a frozen weight, as bitsandbytes holds it if it is quantized."""
    if quantization is None:
        return tensor.nbytes
    if quantization == "int8":
        return tensor.num_elements + 4 * tensor.shape[0]  # a scale per row
    blocks = math.ceil(tensor.num_elements / 64)
    return tensor.num_elements // 2 + blocks + 4 * math.ceil(blocks / 256)  # scales of 8 bits, and theirs


def _moments(trained: list[PlannedTensor], optimizer: str) -> int:
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return sum(8 * tensor.count for tensor in trained)
    large = [tensor.count for tensor in trained if tensor.count >= _SMALLEST]
    small = sum(8 * tensor.count for tensor in trained if tensor.count < _SMALLEST)
    return small + sum(2 * (count + 4 * -(-count // _BLOCK)) for count in large) + (_LEVELS if large else 0)


def _master_bytes(tensor: PlannedTensor, kind: str) -> int:
    dtype = master_dtype(tensor.dtype, kind)
    return 0 if dtype is None else dtype.itemsize * tensor.count
