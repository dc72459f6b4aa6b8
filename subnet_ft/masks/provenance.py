"""Where a mask came from: the record, and its reader, which trusts nothing."""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from subnet_kernels import CRITERIA

COMPARE_DTYPES = ("bfloat16", "float16", "float32")

_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class ModelRecord:
    """A model that a mask was made from: its name and the fingerprint of every tensor in its stored dtype.

    The record of a base is complete: one dtype and one fingerprint for every tensor of the mask. Anything less fits no
    model, and no file holds it.

    Args:
        name: Folder, Hub id or other name as the user wrote it.
        revision: Hub revision, if one was asked for.
        dtypes: Parameter name to dtype, such as `bfloat16`: the stored one, or the one that the weights were cast to
            before the comparison.
        fingerprints: Parameter name to 32 hexadecimal digits, of the tensor in that dtype.
    """

    name: str
    revision: str | None = None
    dtypes: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Provenance:
    """Where a mask came from.

    Args:
        base: The model that the mask applies to; `None` when it is not known.
        tuned: The tuned model that it was compared with, if any.
        criterion: `exact`, `absolute` or `relative`, if it was extracted.
        tolerance: The criterion's tolerance.
        compare_dtype: The dtype that the base was cast to before the comparison, if any.
        source: `kind` and the parameters that reproduce it (seed, step, ...).
        density_by_tolerance: Density of the absolute criterion by tolerance, `f"{t:g}"`; `0` is `exact`.
    """

    base: ModelRecord | None = None
    tuned: ModelRecord | None = None
    criterion: str | None = None
    tolerance: float | None = None
    compare_dtype: str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    density_by_tolerance: dict[str, float] = field(default_factory=dict)


def format_fingerprint(sums: tuple[int, int]) -> str:
    """Write the two 64-bit sums of a fingerprint as 32 hexadecimal digits."""
    return f"{sums[0]:016x}{sums[1]:016x}"


def narrowest_dtype(dtypes: Iterable[torch.dtype]) -> str:
    """Return the dtype to cast to before weights stored in several dtypes are compared.

    It is the narrowest, the first of equals: a cast to a wider one would keep the rounding of the narrower as a change
    of nearly every weight.

    Example:
        `[torch.float32, torch.bfloat16]` gives "bfloat16".
    """
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    known = [name for name in names if name in COMPARE_DTYPES]
    return min(known, key=lambda name: getattr(torch, name).itemsize, default="float32")


def incompleteness(base: ModelRecord, names: Iterable[str]) -> str | None:
    """Say what the record of a base lacks, or has too much, for a mask of the tensors `names`; `None` if nothing."""
    expected = list(names)
    for kind, entries in (("fingerprint", base.fingerprints), ("dtype", base.dtypes)):
        missing = next((name for name in expected if name not in entries), None)
        if missing is not None:
            return f"base `{base.name}` has no {kind} of `{missing}`"
        odd = set(entries).difference(expected)
        if odd:
            return f"base `{base.name}` has a {kind} of `{min(odd)}`, which is not in the mask"
    return None


def parse_provenance(fields: Mapping[str, Any]) -> Provenance:
    """Build a provenance from what JSON gave.

    Raises:
        ValueError: A field is unknown or has a wrong type or value; the message names it.
    """
    _refuse_unknown("provenance", fields, Provenance)
    criterion, tolerance, compare_dtype = (fields.get(key) for key in ("criterion", "tolerance", "compare_dtype"))
    if criterion is not None and criterion not in CRITERIA:
        raise _wrong("criterion", criterion, f"one of {', '.join(CRITERIA)}, or null")
    if tolerance is not None and not (_is_number(tolerance) and tolerance >= 0):
        raise _wrong("tolerance", tolerance, "a number >= 0, or null")
    if compare_dtype is not None and compare_dtype not in COMPARE_DTYPES:
        raise _wrong("compare_dtype", compare_dtype, f"one of {', '.join(COMPARE_DTYPES)}, or null")
    curve = _mapping(
        "density_by_tolerance",
        fields.get("density_by_tolerance", {}),
        _is_share,
        "a number from 0 to 1",
        key=_is_decimal,
    )
    return Provenance(
        base=_parse_model("base", fields.get("base")),
        tuned=_parse_model("tuned", fields.get("tuned")),
        criterion=criterion,
        tolerance=None if tolerance is None else float(tolerance),
        compare_dtype=compare_dtype,
        source=_mapping("source", fields.get("source", {}), lambda value: True, "anything"),
        density_by_tolerance={key: float(value) for key, value in curve.items()},
    )


def _parse_model(where: str, value: Any) -> ModelRecord | None:
    if value is None:
        return None
    fields = _mapping(where, value, lambda entry: True, "anything")
    _refuse_unknown(where, fields, ModelRecord)
    name, revision = fields.get("name"), fields.get("revision")
    if not isinstance(name, str):
        raise _wrong(f"{where}.name", name, "a string")
    if revision is not None and not isinstance(revision, str):
        raise _wrong(f"{where}.revision", revision, "a string or null")
    return ModelRecord(
        name,
        revision,
        _mapping(f"{where}.dtypes", fields.get("dtypes", {}), lambda entry: isinstance(entry, str), "a string"),
        _mapping(f"{where}.fingerprints", fields.get("fingerprints", {}), _is_fingerprint, "32 hexadecimal digits"),
    )


def _refuse_unknown(where: str, fields: Mapping[str, Any], record: type[ModelRecord] | type[Provenance]) -> None:
    unknown = sorted(set(fields) - {entry.name for entry in dataclasses.fields(record)})
    if unknown:
        raise ValueError(f"`{where}` has the unknown field `{unknown[0]}`")


def _mapping(
    where: str,
    value: Any,
    accepts: Callable[[Any], bool],
    wanted: str,
    *,
    key: Callable[[str], bool] = lambda name: True,
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    for name, entry in value.items():
        if not key(name):
            raise _wrong(f"a key of {where}", name, "a number >= 0 as text")
        if not accepts(entry):
            raise _wrong(f"{where}[{reprlib.repr(name)}]", entry, wanted)
    return value


def _wrong(where: str, value: object, wanted: str) -> ValueError:
    return ValueError(f"`{where}` is {reprlib.repr(value)}, expected {wanted}")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_decimal(text: str) -> bool:
    try:
        return _is_number(float(text)) and float(text) >= 0
    except ValueError:
        return False


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, str) and _FINGERPRINT.fullmatch(value) is not None
