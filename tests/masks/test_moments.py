"""Moments are corrected for their start at zero, and belong to one model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from subnet_ft.errors import MaskError, MaskMismatchError
from subnet_ft.masks.moments import Moments, check_moments


def moments(size: int = 6, step: int = 2) -> Moments:
    ones = torch.ones(size)
    return Moments(0.19 * ones, 0.001999 * ones, ones.clone(), step, beta1=0.9, beta2=0.999, eps=1e-8, lr=1e-3)


def test_moments_of_a_constant_gradient_are_that_gradient() -> None:
    """After two steps of gradient 1, exp_avg is 0.19 and exp_avg_sq 0.001999."""
    torch.testing.assert_close(moments().mean_gradient(), torch.ones(6))
    torch.testing.assert_close(moments().mean_square(), torch.ones(6))


def test_part_cuts_every_tensor() -> None:
    whole = replace(
        moments(), exp_avg=torch.arange(6.0), exp_avg_sq=torch.arange(6.0) + 10, master=torch.arange(6.0) + 20
    )
    part = whole.part(slice(2, 4))
    assert part.master is not None
    assert [part.exp_avg.tolist(), part.exp_avg_sq.tolist(), part.master.tolist()] == [[2, 3], [12, 13], [22, 23]]
    assert replace(whole, master=None).part(slice(2, 4)).master is None
    assert (part.step, part.lr) == (whole.step, whole.lr)


def test_check_moments_returns_the_steps_of_the_run() -> None:
    assert check_moments([("a", moments(step=2)), ("b", moments(step=5))], {"a": (2, 3), "b": (6,), "c": (9,)}) == 5


@pytest.mark.parametrize(
    ("found", "error", "said"),
    [
        ([("b", moments())], MaskMismatchError, r"no `b`"),
        ([("a", moments(4))], MaskMismatchError, r"of `a` are \(4,\), the checkpoint's tensor is \(2, 3\)"),
        ([], MaskError, r"no tensor that took a step"),
        ([("a", moments(step=0))], MaskError, r"no tensor that took a step"),
        (iter([("a", moments())]), MaskError, r"only once"),
        ([("a", replace(moments(), exp_avg=torch.full((6,), torch.nan)))], MaskError, r"`a` are not finite"),
        ([("a", replace(moments(), exp_avg_sq=torch.full((6,), torch.inf)))], MaskError, r"`a` are not finite"),
        ([("a", replace(moments(), master=torch.full((6,), torch.nan)))], MaskError, r"`a` are not finite"),
    ],
)
def test_check_moments_refuses_others(found: list[tuple[str, Moments]], error: type[MaskError], said: str) -> None:
    with pytest.raises(error, match=said):
        check_moments(found, {"a": (2, 3)})
