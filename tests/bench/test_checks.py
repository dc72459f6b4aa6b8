"""No speed is shown for an op that gives a wrong result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import subnet_kernels
from subnet_ft.bench.checks import failing_ops
from subnet_ft.bench.step import OURS_COMPACT, OURS_DENSE, measure_steps
from subnet_kernels import dispatch

CPU = torch.device("cpu")


def always(updates: Any, cache: Any) -> bool:
    return True


def for_compact_gradients(updates: Any, cache: Any) -> bool:
    return all(update.grad.shape == (update.mask.count,) for update in updates) and len(updates) > 1


def from_the_second_step(updates: Any, cache: Any) -> bool:
    return for_compact_gradients(updates, cache) and updates[0].step > 1


def with_a_kept_cache(updates: Any, cache: Any) -> bool:
    return bool(cache)


def for_many_dense_gradients(updates: Any, cache: Any) -> bool:
    return len(updates) > 1 and any(update.grad.dtype == torch.bfloat16 for update in updates)


def break_op(monkeypatch: pytest.MonkeyPatch, op: str, when: Callable[[Any, Any], bool] = always) -> None:
    """Make an op lose the last bit of what it writes, as a wrong kernel might; `masked_adamw` only `when` told so."""
    original = dispatch.choose

    def choose(name: str, device: torch.device, backend: str | None = None) -> dispatch.Choice:
        found = original(name, device, backend)
        if name != op:
            return found

        def broken(*args: Any, **options: Any) -> Any:
            is_wrong = op != "masked_adamw" or when(args[0], options.get("cache"))
            result = found.function(*args, **options)
            if op == "masked_adamw":
                for update in args[0] if is_wrong else ():
                    update.exp_avg.view(torch.int32).bitwise_xor_(1)
                return result
            if op == "compact":
                args[2].view(torch.int32).bitwise_xor_(1)
                return result
            if op == "compare":
                return dataclasses.replace(result, beyond=(result.beyond[0] + 1, *result.beyond[1:]))
            return (result[0], result[1] + 1)

        return dispatch.Choice(broken, found.backend, found.reason)

    for module in ("bits", "copies", "hashing", "updates"):
        monkeypatch.setattr(f"subnet_kernels.ops.{module}.choose", choose)


def test_all_ops_are_right_here() -> None:
    assert failing_ops(CPU) == {}


@pytest.mark.parametrize("op", ["masked_adamw", "compact", "compare", "changed_bits", "fingerprint"])
def test_failing_ops_names_a_broken_one(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    break_op(monkeypatch, op)
    failing = failing_ops(CPU)
    assert list(failing) == [op]
    backend = subnet_kernels.choose(op, CPU).backend
    assert f"`{op}` ({backend}) differs from its reference" in failing[op]


@pytest.mark.parametrize(
    "when", [for_compact_gradients, from_the_second_step, with_a_kept_cache, for_many_dense_gradients]
)
def test_failing_ops_runs_the_optimizer_as_it_is_timed(
    monkeypatch: pytest.MonkeyPatch, when: Callable[[Any, Any], bool]
) -> None:
    break_op(monkeypatch, "masked_adamw", when)
    failing = failing_ops(CPU)
    assert list(failing) == ["masked_adamw"]
    assert "`exp_avg` of `one` after step" in failing["masked_adamw"]
    assert (
        f"MaskedAdamW(compact_grads={when is not for_many_dense_gradients and when is not with_a_kept_cache})"
        in (failing["masked_adamw"])
    )


def test_failing_ops_reports_an_op_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*args: Any, **options: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(subnet_kernels, "compact", raises)
    assert "RuntimeError: no such instruction" in failing_ops(CPU)["compact"]


def test_measure_steps_shows_no_speed_for_a_broken_op() -> None:
    rows = list(measure_steps(densities=[0.3], num_layers=1, repeats=1, refused={"masked_adamw": "it is wrong"}))
    shown = {row["method"]: row["median_ms"] for row in rows}
    assert shown[OURS_DENSE] is None
    assert shown[OURS_COMPACT] is None
    assert all(time is not None for method, time in shown.items() if method not in (OURS_DENSE, OURS_COMPACT))
    assert {row.get("refused") for row in rows} == {None, "it is wrong"}
