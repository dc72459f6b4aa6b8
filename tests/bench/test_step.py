"""The rows of the step benchmark: which methods, and what they hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from subnet_ft.bench import step
from subnet_ft.bench.step import (
    FUSED,
    FUSED_MASTERS,
    GATHERED,
    OURS_COMPACT,
    OURS_DENSE,
    TIMES_MASK,
    measure_steps,
    smollm2_shapes,
)
from subnet_ft.bench.tracker import StorageTracker


def test_smollm2_shapes_are_those_of_the_model() -> None:
    shapes = smollm2_shapes()
    assert len(shapes) == 272
    assert sum(math.prod(shape) for shape in shapes.values()) == 134_515_008


@pytest.fixture(scope="module")
def rows() -> dict[tuple[float, str], dict[str, Any]]:
    measured = measure_steps(densities=[0.2, 1.0], num_layers=1, repeats=1)
    return {(row["density"], row["method"]): row for row in measured}


def test_measure_steps_times_every_method_at_every_density(rows: dict[tuple[float, str], dict[str, Any]]) -> None:
    methods = {FUSED, TIMES_MASK, GATHERED, OURS_DENSE, OURS_COMPACT}
    assert {method for density, method in rows if density == 0.2} == methods
    assert {method for density, method in rows if density == 1.0} == methods | {FUSED_MASTERS}
    assert all(row["median_ms"] > 0 for row in rows.values())


def test_measure_steps_counts_the_bytes_of_every_component(rows: dict[tuple[float, str], dict[str, Any]]) -> None:
    held = {method: rows[0.2, method]["bytes_per_parameter"] for _, method in rows if (0.2, method) in rows}
    # bf16 weights and gradients, bf16 moments; a mask of bf16 is two bytes more.
    assert held[FUSED] == pytest.approx(8.0, abs=0.01)
    assert held[TIMES_MASK] == pytest.approx(10.0, abs=0.01)
    # Weights, moments and masters of a fifth, and one bit with 4 bytes per 1,024 weights; dense or compact gradients.
    assert held[OURS_DENSE] == pytest.approx(2 + 2 + 0.2 * 12 + 0.129, abs=0.02)
    assert held[OURS_COMPACT] == pytest.approx(2 + 0.2 * 16 + 0.129, abs=0.02)
    index = rows[0.2, OURS_COMPACT]["memory"]["mask"]
    weights = rows[0.2, OURS_COMPACT]["memory"]["weights"] / 2
    assert index <= 2 * 0.2 * weights  # at most 2 bytes per trainable weight


def test_gradient_times_mask_allocates_nothing_and_leaves_shared_gradients_alone() -> None:
    start = {"weight": torch.ones(100, 50).bfloat16()}
    grads = {"weight": torch.ones(100, 50).bfloat16()}
    dense = {"weight": torch.arange(5000).view(100, 50) % 5 == 0}
    method = step._times_mask(start, grads, dense)
    method.step()  # makes the state
    tracker = StorageTracker(lambda op, tensor: op if tensor.numel() == 5000 else None)
    with tracker:
        method.step()
    assert tracker.peaks()[0].total == 0
    assert torch.equal(grads["weight"], torch.ones(100, 50).bfloat16())
    assert method.memory() == {"weights": 10_000, "gradients": 10_000, "moments": 20_000, "mask": 10_000}
