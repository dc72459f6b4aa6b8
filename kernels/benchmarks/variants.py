"""The kernels that the static proof compiles: each in the forms that matter for registers and widths."""

from __future__ import annotations

from typing import Any, NamedTuple

from subnet_kernels.gpu.compact import compact_slots
from subnet_kernels.gpu.compare import compare_tile
from subnet_kernels.gpu.copies import gather_slots, scatter_slots, swap_slots
from subnet_kernels.gpu.fingerprint import fingerprint_tile
from subnet_kernels.gpu.step import step_full, step_slots

_BITS = {"bfloat16": "*i16", "float16": "*i16", "float32": "*i32"}


class Variant(NamedTuple):
    """One kernel with the types of its arguments and its constants."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    is_slotwise: bool


# Rule, weights, gradient, master, and whether weights are known to be rounded masters.
_STEPS = [
    ("adamw", "bfloat16", "compact", "float32", True),
    ("adamw", "bfloat16", "compact", "float32", False),
    ("adamw", "bfloat16", "bfloat16", "float32", True),
    ("adamw", "bfloat16", "compact", "remainder", False),
    ("adamw", "bfloat16", "bfloat16", "remainder", False),
    ("adamw", "bfloat16", "compact", "stochastic", False),
    ("adamw", "float16", "float16", "float32", True),
    ("adamw", "float32", "compact", "own", False),
    ("adamw", "float32", "float32", "own", False),
    ("sgd", "bfloat16", "compact", "remainder", False),
    ("momentum", "bfloat16", "compact", "float32", True),
    ("nesterov", "bfloat16", "bfloat16", "remainder", False),
]
_FULL_STEPS = [
    ("adamw", "bfloat16", "compact", "float32"),
    ("adamw", "bfloat16", "bfloat16", "float32"),
    ("adamw", "bfloat16", "bfloat16", "remainder"),
    ("adamw", "bfloat16", "compact", "stochastic"),
    ("adamw", "float16", "float16", "float32"),
    ("adamw", "float32", "float32", "own"),
    ("nesterov", "bfloat16", "bfloat16", "remainder"),
]


def variants() -> list[Variant]:
    """Return every variant, by name."""
    return [*_steps(), *_copies(), *_readers()]


def _steps() -> list[Variant]:
    pointers = {"tiles_ptr": "*i32", "table_ptr": "*i64", "scale_ptr": "*fp32"}
    names = ("RULE", "PARAM_KIND", "GRAD_KIND", "MASTER_KIND", "IS_ROUNDED")
    found = []
    for chosen in _STEPS:
        rule, weights, grad, master, is_rounded = chosen
        name = f"step_slots {rule} {weights}, {grad} gradient, {master} master{', rounded' if is_rounded else ''}"
        found.append(Variant(name, step_slots, pointers, dict(zip(names, chosen, strict=True)), True))
    for chosen in _FULL_STEPS:
        rule, weights, grad, master = chosen
        name = f"step_full {rule} {weights}, {grad} gradient, {master} master"
        found.append(Variant(name, step_full, pointers, dict(zip(names, chosen, strict=False)), False))
    return found


def _copies() -> list[Variant]:
    def pointers(dense: str, compact: str) -> dict[str, str]:
        return {
            "dense_ptr": dense, "bits_ptr": "*u8", "offsets_ptr": "*i32", "bases_ptr": "*i64", "compact_ptr": compact,
        }  # fmt: skip

    found = [
        Variant("gather_slots 16 bits", gather_slots, pointers("*i16", "*i16"), {"WIDEN_KIND": None}, True),
        Variant("gather_slots bfloat16 to float32", gather_slots, pointers("*i16", "*i32"),
                {"WIDEN_KIND": "bfloat16"}, True),
        Variant("scatter_slots 16 bits", scatter_slots, pointers("*i16", "*i16"), {}, True),
        Variant("scatter_slots 32 bits", scatter_slots, pointers("*i32", "*i32"), {}, True),
        Variant("swap_slots 16 bits", swap_slots, pointers("*i16", "*i16"), {"IS_FULL": False}, True),
        Variant("swap_slots 32 bits, full mask", swap_slots, pointers("*i32", "*i32"), {"IS_FULL": True}, True),
    ]  # fmt: skip
    for kind, accumulates, is_full in (
        ("bfloat16", True, False),
        ("bfloat16", False, False),
        ("float32", True, False),
        ("bfloat16", True, True),
    ):
        signature = {
            "dense_ptr": _BITS[kind], "bits_ptr": "*u8", "offsets_ptr": "*i32", "bases_ptr": "*i64",
            "out_ptr": "*fp32", "partials_ptr": "*fp64", "scale": "fp32",
        }  # fmt: skip
        constants = {"KIND": kind, "ACCUMULATE": accumulates, "IS_FULL": is_full}
        name = f"compact_slots {kind}{', accumulating' if accumulates else ''}{', full mask' if is_full else ''}"
        found.append(Variant(name, compact_slots, signature, constants, True))
    return found


def _readers() -> list[Variant]:
    found = []
    for criterion, kind, is_partial in (
        ("exact", "bfloat16", False),
        ("exact", "float32", False),
        ("absolute", "bfloat16", False),
        ("relative", "bfloat16", True),
    ):
        signature = {
            "base_ptr": _BITS[kind], "tuned_ptr": _BITS[kind], "bits_ptr": "*u8", "counts_ptr": "*i32",
            "num_elements": "i64", "tolerance": "fp32", "first_tile": "i64",
        }  # fmt: skip
        constants = {"CRITERION": criterion, "KIND": kind, "IS_PARTIAL": is_partial}
        name = f"compare_tile {criterion} {kind}{', partial tile' if is_partial else ''}"
        found.append(Variant(name, compare_tile, signature, constants, False))
    for dtype, has_mask, is_partial in (("i16", False, False), ("i16", True, False), ("i32", False, True)):
        signature = {
            "flat_ptr": f"*{dtype}", "bits_ptr": "*i32", "partials_ptr": "*i64", "num_elements": "i64",
            "offset": "i64", "first_tile": "i64",
        }  # fmt: skip
        constants = {"HAS_MASK": has_mask, "IS_PARTIAL": is_partial}
        suffix = f"{', outside a mask' if has_mask else ''}{', partial tile' if is_partial else ''}"
        found.append(
            Variant(f"fingerprint_tile {dtype[1:]} bits{suffix}", fingerprint_tile, signature, constants, False)
        )
    return found
