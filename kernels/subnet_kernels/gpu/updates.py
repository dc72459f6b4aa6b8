"""Optimizer steps over many tensors: a plan of launches from the masks, and a table that changes with the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from subnet_kernels.gpu import launch, step
from subnet_kernels.gpu.values import KINDS
from subnet_kernels.layout import TILE_SIZE, BitMask
from subnet_kernels.updates import AdamWUpdate, SGDUpdate

Update = AdamWUpdate | SGDUpdate
_ALIGNMENT = 16  # bytes: what a vector load of `step_full` needs


def masked_adamw(updates: Sequence[AdamWUpdate], *, grad_scale: torch.Tensor | None, cache: dict[Any, Any]) -> None:
    """Update the masked elements of every tensor in place; the number of launches does not grow with the tensors."""
    live = [update for update in updates if update.mask.count]
    rows = [_row(update, update.exp_avg, update.exp_avg_sq) for update in live]
    _run(live, ["adamw"] * len(live), rows, [update.scalars for update in live], grad_scale, cache)


def masked_sgd(updates: Sequence[SGDUpdate], *, grad_scale: torch.Tensor | None, cache: dict[Any, Any]) -> None:
    """Update the masked elements of every tensor by SGD, in place, in the same few launches."""
    live = [update for update in updates if update.mask.count]
    rules = [
        "sgd" if update.momentum_buffer is None else "nesterov" if update.nesterov else "momentum" for update in live
    ]
    rows = [_row(update, update.momentum_buffer, None) for update in live]
    scalars = [(update.weight_decay, update.momentum, update.lr) for update in live]
    _run(live, rules, rows, scalars, grad_scale, cache)


class Plan:
    """What a step needs and the masks alone decide: which tiles each launch works on. It stays as long as they do.

    Args:
        masks: One per row of the table.
        kinds: One per row.
        device: Where the tensors lie.
    """

    def __init__(self, masks: list[BitMask], kinds: list[_Kind], device: torch.device) -> None:
        self.masks = masks  # kept alive, so that no other mask takes their identities
        self.bits = [launch.whole_tiles(mask) for mask in masks]
        self.ones = torch.ones((), dtype=torch.float32, device=device)
        self.launches = _launches(masks, kinds, device)
        self._host = np.empty((0, step.COLUMNS), dtype=np.int64)
        self._table = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes on the device beside the masks: the tiles of every launch, and the table."""
        return self._table.nbytes + sum(tiles.nbytes for _, tiles, _ in self.launches)

    def upload(self, rows: list[list[int]], scalars: Sequence[tuple[float, ...]], device: torch.device) -> torch.Tensor:
        """Return the table of this step on the device; a copy only where a number changed since the last one."""
        host = np.zeros((len(rows), step.COLUMNS), dtype=np.int64)
        host[:, : step.SCALARS] = rows
        host[:, step.BITS] = [bits.data_ptr() for bits in self.bits]
        first = 2 * step.SCALARS
        host.view(np.float32)[:, first : first + len(scalars[0])] = scalars
        if not np.array_equal(host, self._host):
            table = torch.from_numpy(host)
            # torch keeps the pinned memory until the copy is done, so the next step may fill another piece at once.
            self._table = table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
            self._host = host
        return self._table


def _row(update: Update, first_state: torch.Tensor | None, second_state: torch.Tensor | None) -> list[int]:
    """Return the addresses of one tensor and its key, in the order of the columns before `SCALARS`."""
    tensors = (
        update.param, update.mask.bits, update.mask.offsets, update.mask.bases, update.grad,
        first_state, second_state, update.master,
    )  # fmt: skip
    return [*(0 if tensor is None else tensor.data_ptr() for tensor in tensors), update.rounding_key or 0]


class _Kind(NamedTuple):
    """What decides which kernel a tensor's tiles run: the kernel's constants, and whether it has a vectorised form."""

    rule: str
    param: str
    grad: str
    master: str
    is_rounded: bool
    is_vectorised: bool


def _kind(update: Update, rule: str, row: list[int]) -> _Kind:
    param, grad, master, mask = update.param, update.grad, update.master, update.mask
    is_compact = grad.dtype == torch.float32 and grad.shape == (mask.count,)
    if master is None:
        master_kind = "own" if param.dtype == torch.float32 else "stochastic"
    else:
        master_kind = "remainder" if master.dtype == torch.int16 else "float32"
    vectors = (row[step.PARAM], row[step.GRAD], row[step.FIRST_STATE], row[step.SECOND_STATE], row[step.MASTER])
    return _Kind(
        rule=rule,
        param=KINDS[param.dtype],
        grad="compact" if is_compact else KINDS[grad.dtype],
        master=master_kind,
        is_rounded=update.is_rounded and master_kind == "float32",
        is_vectorised=mask.is_full and not any(address % _ALIGNMENT for address in vectors),
    )


def _launches(
    masks: list[BitMask], kinds: list[_Kind], device: torch.device
) -> list[tuple[Any, torch.Tensor, dict[str, Any]]]:
    """Group the tiles of all rows by the kernel that they need: (kernel, (P, 2) int32 rows and tiles, constants)."""
    full: dict[tuple[str, ...], list[np.ndarray]] = {}
    by_slots: dict[tuple[str | bool, ...], list[np.ndarray]] = {}
    for row, (mask, kind) in enumerate(zip(masks, kinds, strict=True)):
        # A full mask's whole tiles need no bits. A partial one does: its bits end where the tensor does.
        whole = mask.num_elements // TILE_SIZE if kind.is_vectorised else 0
        if whole:
            full.setdefault(kind[:4], []).append(_tiles(row, 0, whole))
        if whole < mask.num_tiles:
            by_slots.setdefault(kind[:5], []).append(_tiles(row, whole, mask.num_tiles))
    names = ("RULE", "PARAM_KIND", "GRAD_KIND", "MASTER_KIND", "IS_ROUNDED")
    return [
        (function, torch.from_numpy(np.concatenate(tiles)).to(device), dict(zip(names, constants, strict=False)))
        for function, groups in ((step.step_full, full), (step.step_slots, by_slots))
        for constants, tiles in groups.items()
    ]


def _tiles(row: int, first: int, last: int) -> np.ndarray:
    tiles: np.ndarray = np.empty((last - first, 2), dtype=np.int32)
    tiles[:, 0] = row
    tiles[:, 1] = np.arange(first, last, dtype=np.int32)
    return tiles


def _run(
    updates: Sequence[Update],
    rules: list[str],
    rows: list[list[int]],
    scalars: Sequence[tuple[float, ...]],
    grad_scale: torch.Tensor | None,
    cache: dict[Any, Any],
) -> None:
    if not updates:
        return
    device = updates[0].param.device
    kinds = [_kind(update, rule, row) for update, rule, row in zip(updates, rules, rows, strict=True)]
    signature = [(id(update.mask), *kind) for update, kind in zip(updates, kinds, strict=True)]
    if cache.get("triton_signature") != signature:
        cache["triton_plan"] = Plan([update.mask for update in updates], kinds, device)
        cache["triton_signature"] = signature
    plan: Plan = cache["triton_plan"]
    table = plan.upload(rows, scalars, device)
    scale = plan.ones if grad_scale is None else grad_scale.to(device, torch.float32)
    for function, tiles, constants in plan.launches:
        launch.launch(
            function, len(tiles), tiles, table, scale,
            device=device, is_slotwise=function is step.step_slots, **constants,
        )  # fmt: skip
