"""`subnet-ft mask make` and `subnet-ft mask combine`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from subnet_ft.cli.masks import emit_saved
from subnet_ft.cli.results import FINE, Emit, check_folder
from subnet_ft.errors import SubnetError

if TYPE_CHECKING:
    from subnet_ft.masks import SubnetMask

RULES = ("union", "intersection", "majority", "difference")
LIKE = (
    "uniform",
    "magnitude_matched",
    "inverted",
    "layer_permuted",
    "low_magnitude",
    "principal",
    "non_principal",
)
"""Kinds that match the size of another mask."""
FROM_BASE = ("low_magnitude", "predicted", "principal", "non_principal", "uniform")
FROM_STATE = ("forecast", "gradient", "fisher")
"""Kinds that read the optimizer's state after a few steps of a full run."""
KINDS = tuple(dict.fromkeys((*LIKE, *FROM_BASE, "early", *FROM_STATE)))

_LOOK_AT_WEIGHTS = ("magnitude_matched", "low_magnitude", "principal", "non_principal")
_OPTIONS = (
    "like", "density", "base", "seed", "dtype", "rank", "scope", "reach", "state", "recall", "total_steps", "tuned",
    "criterion", "tolerance",
)  # fmt: skip


def make_mask(options: argparse.Namespace, emit: Emit) -> int:
    """Make a mask of one kind, write it and print its figures."""
    make = _maker(options)
    _check_output(options)
    emit_saved(make(options), options, emit)
    return FINE


def combine_masks(options: argparse.Namespace, emit: Emit) -> int:
    """Combine mask files to one."""
    from subnet_ft.masks import SubnetMask, combine

    _check_output(options)
    masks = [SubnetMask.load(path) for path in options.masks]
    emit_saved(combine(masks, options.rule, at_least=options.at_least), options, emit)
    return FINE


def _maker(options: argparse.Namespace) -> Callable[[argparse.Namespace], SubnetMask]:
    """Check which options stand together, and return what makes the mask."""
    kind = options.kind
    if options.like is not None:
        if kind not in LIKE:
            raise SubnetError(
                f"A mask of kind `{kind}` matches no other mask: remove `--like`, or make {_named(LIKE)}."
            )
        _check_options(options, needed=(), allowed=("like", "base", "seed", *_rank_of(kind)))
        return _like
    if kind == "forecast":
        sizes = ("density", "recall", "total_steps")
        _check_options(options, needed=("base", "state"), allowed=("seed", "dtype", *sizes))
        return _forecast
    if kind in FROM_STATE:
        _check_options(options, needed=("base", "state", "density"), allowed=("seed", "dtype", "scope"))
        return _by_gradients
    if kind == "early":
        _check_options(options, needed=("base", "tuned"), allowed=("dtype", "criterion", "tolerance"))
        return _early
    if kind not in FROM_BASE:
        raise SubnetError(f"A mask of kind `{kind}` has the size of another mask: name that one with `--like MASK`.")
    size = "reach" if kind == "predicted" and options.reach is not None else "density"
    scope = ("scope",) if kind == "uniform" else ()
    _check_options(options, needed=("base", size), allowed=("seed", "dtype", *scope, *_rank_of(kind)))
    return _from_base


def _like(options: argparse.Namespace) -> SubnetMask:
    from subnet_ft.checkpoints import open_checkpoint
    from subnet_ft.masks import SubnetMask, control_mask

    mask = SubnetMask.load(options.like)
    weights = None
    if options.kind in _LOOK_AT_WEIGHTS or options.base is not None:
        recorded = mask.provenance.base
        name = options.base or (None if recorded is None else recorded.name)
        if name is None:
            raise SubnetError(f"`{options.like}` does not name its base. Name it with `--base`.")
        base = open_checkpoint(name)
        mask.check_base(base)
        weights = base.tensors()
    return control_mask(mask, options.kind, seed=options.seed or 0, weights=weights, rank=options.rank)


def _from_base(options: argparse.Namespace) -> SubnetMask:
    from subnet_ft.masks import base_mask

    return base_mask(
        options.base,
        options.kind,
        density=options.density,
        seed=options.seed or 0,
        dtype=options.dtype,
        rank=options.rank,
        scope=options.scope or "tensor",
        reach=options.reach,
        progress=not options.quiet,
    )


def _forecast(options: argparse.Namespace) -> SubnetMask:
    from subnet_ft.masks.forecast import forecast_mask
    from subnet_ft.training.moments import read_moments

    moments = read_moments(options.state)
    return forecast_mask(
        options.base,
        moments,
        total_steps=moments.total_steps if options.total_steps is None else options.total_steps,
        density=options.density,
        recall=options.recall,
        dtype=options.dtype,
        seed=options.seed or 0,
    )


def _by_gradients(options: argparse.Namespace) -> SubnetMask:
    from subnet_ft.masks.gradients import gradient_mask
    from subnet_ft.training.moments import read_moments

    return gradient_mask(
        options.base,
        read_moments(options.state),
        options.kind,
        density=options.density,
        scope=options.scope or "tensor",
        dtype=options.dtype,
        seed=options.seed or 0,
    )


def _early(options: argparse.Namespace) -> SubnetMask:
    from subnet_ft.masks import early_mask

    return early_mask(
        options.base,
        options.tuned,
        criterion=options.criterion or "exact",
        tolerance=options.tolerance or 0.0,
        dtype=options.dtype,
        progress=not options.quiet,
    )


def _check_output(options: argparse.Namespace) -> None:
    from subnet_ft.masks.file import check_writable

    check_writable(Path(options.output))
    check_folder(Path(options.output).parent)


def _rank_of(kind: str) -> tuple[str, ...]:
    return ("rank",) if kind in ("principal", "non_principal") else ()


def _check_options(options: argparse.Namespace, *, needed: Iterable[str], allowed: Iterable[str]) -> None:
    needed, allowed = tuple(needed), tuple(allowed)
    missing = [name for name in needed if getattr(options, name) is None]
    with_like = " or `--like`" if "density" in missing and options.kind in LIKE else ""
    if missing:
        raise SubnetError(f"A mask of kind `{options.kind}` needs {_flags(missing)}{with_like}.")
    unused = [name for name in _OPTIONS if getattr(options, name) is not None and name not in (*needed, *allowed)]
    if unused:
        beside = " with `--like`" if options.like is not None else ""
        raise SubnetError(
            f"A mask of kind `{options.kind}`{beside} does not use {_flags(unused)}; its options are "
            f"{_flags((*needed, *allowed))}."
        )


def _flags(names: Iterable[str]) -> str:
    return _named(f"--{name.replace('_', '-')}" for name in names)


def _named(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)
